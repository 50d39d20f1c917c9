//! The stock allocator's service, as little of it as is needed: restart it, and read what it said.

use crate::host::inventory::ALLOCATOR_UNIT;
use enclaved_core::failure::Failure;
use futures_util::StreamExt;
use std::future::Future;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use zbus::{Connection, OwnedObjectPath, Proxy};

/// Moving pages out of the way of large ones can take minutes on a big host that is in use. The unit itself has no limit.
const RESTART_PATIENCE: Duration = Duration::from_mins(10);
const JOURNAL_PATIENCE: Duration = Duration::from_secs(10);
/// As much of the journal as is read.
const MAX_JOURNAL: u64 = 64 * 1024;

/// Why the service was not restarted, or what came of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestartError {
    /// It did not run: systemd can't be reached or refused, there is no such unit, it is masked. Nothing has changed.
    #[error("{0}")]
    NotRun(Failure),
    /// It ran and failed. What it did until then is to be seen in the pool.
    #[error("{0}")]
    Failed(Failure),
    /// It runs, or ran, or will run: whether is not known. Nothing may be done on top of that.
    #[error("{0}")]
    Unknown(Failure),
}

/// What is done to the service.
pub trait StockService: Send + Sync {
    /// Restarts it and waits until its job is over. That it says it succeeded proves nothing: look at the pool.
    fn restart(&self) -> impl Future<Output = Result<(), RestartError>> + Send;

    /// Its last lines in the journal.
    fn journal(&self, lines: u32) -> impl Future<Output = Result<Vec<String>, Failure>> + Send;
}

/// The service under systemd.
#[derive(Debug, Clone, Copy)]
pub struct Systemd;

impl StockService for Systemd {
    async fn restart(&self) -> Result<(), RestartError> {
        within(RESTART_PATIENCE, Connection::system()).await
    }

    async fn journal(&self, lines: u32) -> Result<Vec<String>, Failure> {
        let failed = |error: std::io::Error| Failure::new(format!("could not run journalctl: {error}"));
        let mut command = tokio::process::Command::new("journalctl");
        command
            .args(["--unit", ALLOCATOR_UNIT, "--no-pager", "--quiet", "--output", "short-iso", "--lines"])
            .arg(lines.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn().map_err(failed)?;
        let stdout = child.stdout.take().ok_or_else(|| Failure::new("journalctl has no output"))?;
        let mut bytes = Vec::new();
        let read = async {
            stdout.take(MAX_JOURNAL).read_to_end(&mut bytes).await?;
            child.wait().await
        };
        match tokio::time::timeout(JOURNAL_PATIENCE, read).await {
            Ok(Ok(_)) => Ok(String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect()),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(Failure::new(format!("journalctl did not end within {} s", JOURNAL_PATIENCE.as_secs()))),
        }
    }
}

/// Restarts the unit over that connection to systemd, all of it within `patience`.
async fn within(
    patience: Duration,
    connection: impl Future<Output = zbus::Result<Connection>>,
) -> Result<(), RestartError> {
    let mut asked = false;
    let restart = async {
        let connection = connection.await.map_err(|error| RestartError::NotRun(bus_failure(&error)))?;
        restart_over(&connection, &mut asked).await
    };
    let ended = tokio::time::timeout(patience, restart).await;
    let seconds = patience.as_secs();
    match ended {
        Ok(result) => result,
        Err(_) if asked => Err(RestartError::Unknown(
            Failure::new(format!("{ALLOCATOR_UNIT} did not end within {seconds} s of being restarted"))
                .with_remedy(format!("`systemctl status {ALLOCATOR_UNIT}` says whether it still runs")),
        )),
        Err(_) => Err(RestartError::NotRun(Failure::new(format!(
            "systemd could not be asked within {seconds} s to restart {ALLOCATOR_UNIT}"
        )))),
    }
}

/// Restarts the unit. `asked` is set before systemd is asked to: from then on it may run.
async fn restart_over(connection: &Connection, asked: &mut bool) -> Result<(), RestartError> {
    let failed = |error: zbus::Error| RestartError::NotRun(bus_failure(&error));
    let lost = |error: zbus::Error| RestartError::Unknown(bus_failure(&error));
    let manager = Proxy::new(
        connection,
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
    );
    let manager = manager.await.map_err(failed)?;
    // Without a subscriber systemd sends no signals; and the job may be over before the call that made it returns.
    let mut removed = manager.receive_signal("JobRemoved").await.map_err(failed)?;
    manager.call_method("Subscribe", &()).await.map_err(failed)?;
    *asked = true;
    let job: OwnedObjectPath = match manager.call("RestartUnit", &(ALLOCATOR_UNIT, "replace")).await {
        Ok(job) => job,
        Err(error) if refused(&error) => return Err(failed(error)),
        Err(error) => return Err(lost(error)),
    };
    while let Some(signal) = removed.next().await {
        let (_, path, _, result): (u32, OwnedObjectPath, String, String) = signal.body().deserialize().map_err(lost)?;
        if path == job {
            return of_job(&result);
        }
    }
    Err(RestartError::Unknown(Failure::new(format!(
        "the connection to systemd ended while {ALLOCATOR_UNIT} was restarted"
    ))))
}

/// What the result of a job says (org.freedesktop.systemd1(5), "JobRemoved").
fn of_job(result: &str) -> Result<(), RestartError> {
    let failure = Failure::new(format!("restarting {ALLOCATOR_UNIT}: {result}"));
    match result {
        "done" => Ok(()),
        "failed" => Err(RestartError::Failed(failure)),
        "dependency" | "skipped" | "invalid" | "assert" | "unsupported" => Err(RestartError::NotRun(failure)),
        // Timed out while it was started or stopped, cancelled by another job, or a word of a later systemd.
        _ => Err(RestartError::Unknown(failure)),
    }
}

/// Whether systemd itself, or the bus before it, answered that it does not do it. A lost answer is no answer.
fn refused(error: &zbus::Error) -> bool {
    use zbus::fdo;
    match error {
        // systemd's own: NoSuchUnit, UnitMasked and the like.
        zbus::Error::MethodError(..) => true,
        zbus::Error::FDO(error) => !matches!(
            **error,
            fdo::Error::NoReply(_)
                | fdo::Error::Timeout(_)
                | fdo::Error::TimedOut(_)
                | fdo::Error::Disconnected(_)
                | fdo::Error::ZBus(_)
        ),
        _ => false,
    }
}

fn bus_failure(error: &zbus::Error) -> Failure {
    let failure = Failure::from_error(error);
    Failure { message: format!("asking systemd to restart {ALLOCATOR_UNIT}: {}", failure.message), ..failure }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_was_cancelled_or_timed_out_may_still_do_something() {
        assert_eq!(of_job("done"), Ok(()));
        assert!(matches!(of_job("failed"), Err(RestartError::Failed(_))));
        assert!(matches!(of_job("dependency"), Err(RestartError::NotRun(_))));
        for result in ["canceled", "timeout", "something new"] {
            assert!(matches!(of_job(result), Err(RestartError::Unknown(_))), "{result}");
        }
    }

    #[test]
    fn an_answer_of_systemd_is_a_refusal_and_a_lost_one_is_not() {
        let call = zbus::Message::method_call("/a", "RestartUnit").build(&()).unwrap();
        let answer = |name: &str| {
            let reply = zbus::Message::error(&call.header(), name).build(&("why",)).unwrap();
            zbus::Error::from(reply)
        };
        for name in [
            "org.freedesktop.systemd1.NoSuchUnit",
            "org.freedesktop.systemd1.UnitMasked",
            "org.freedesktop.DBus.Error.AccessDenied",
        ] {
            assert!(refused(&answer(name)), "{name}");
        }
        assert!(!refused(&answer("org.freedesktop.DBus.Error.NoReply")));
        assert!(!refused(&zbus::Error::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_bus_that_never_answers_is_waited_for_no_longer_than_for_the_restart() {
        let Err(RestartError::NotRun(failure)) = within(RESTART_PATIENCE, std::future::pending()).await else {
            panic!()
        };
        assert!(failure.message.contains("could not be asked within 600 s"), "{failure}");
    }
}
