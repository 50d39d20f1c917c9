//! Waiting until enclaves are ready, over restarts of the daemon.

use super::client::Client;
use super::status::{problem, stand};
use super::{CtlError, unknown};
use enclaved_core::id::EnclaveName;
use enclaved_core::status::{EnclaveState, EnclaveStatus, Problem, Status};
use std::io::Write;
use std::time::Duration;
use tokio::time::Instant;

/// Nobody waits longer than a year.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// How progress is shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Show {
    /// On a terminal: lines are overwritten. Else every change is a new line.
    pub(super) redraw: bool,
}

/// Waits until these enclaves, or all, are ready.
pub(super) async fn wait(
    client: &Client,
    names: &[EnclaveName],
    timeout: Duration,
    show: Option<Show>,
) -> Result<(), CtlError> {
    let progress = show.map(|show| Progress::new(std::io::stderr(), show));
    until_ready(async || client.status().await, names, timeout, progress).await
}

async fn until_ready<W: Write>(
    mut look: impl AsyncFnMut() -> Result<Status, CtlError>,
    names: &[EnclaveName],
    timeout: Duration,
    mut progress: Option<Progress<W>>,
) -> Result<(), CtlError> {
    let deadline = Instant::now() + timeout.min(LONGEST);
    let mut last = None;
    loop {
        // The first look is never cut short, so that a timeout of 0 looks once.
        let looked = match &last {
            None => Ok(look().await),
            Some(_) => tokio::time::timeout_at(deadline, look()).await,
        };
        match looked {
            Ok(Ok(status)) => match judge(&status, names)? {
                Verdict::Ready => return Ok(()),
                Verdict::NotReady { lines, reasons } => {
                    if let Some(progress) = &mut progress {
                        progress.show(lines);
                    }
                    last = Some(reasons.join("\n"));
                }
            },
            // It may be starting, or being upgraded.
            Ok(Err(CtlError::TryAgain(text))) => {
                if let Some(progress) = &mut progress {
                    progress.show(vec!["enclaved does not answer".to_owned()]);
                }
                last = Some(text);
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => {}
        }
        if Instant::now() + PAUSE > deadline {
            let time = humantime::format_duration(timeout);
            let last = last.unwrap_or_default().replace('\n', "\n  ");
            return Err(CtlError::TryAgain(format!("not ready after {time}\n  {last}")));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

enum Verdict {
    Ready,
    NotReady {
        /// Where each enclave stands.
        lines: Vec<String>,
        /// The same and what is wrong, for the end of the wait.
        reasons: Vec<String>,
    },
}

fn judge(status: &Status, names: &[EnclaveName]) -> Result<Verdict, CtlError> {
    let missing = names.iter().find(|name| !status.enclaves.iter().any(|enclave| enclave.name == **name));
    if let Some(name) = missing {
        return Err(unknown(name, status.enclaves.iter().map(|enclave| &enclave.name)));
    }
    let asked = |enclave: &&EnclaveStatus| match names {
        [] => enclave.wanted && enclave.state != EnclaveState::Held,
        names => names.contains(&enclave.name),
    };
    let unready: Vec<_> = status.enclaves.iter().filter(asked).filter(|enclave| !enclave.ready).collect();
    if unready.is_empty() && (status.ready || !names.is_empty()) {
        return Ok(Verdict::Ready);
    }
    let lines: Vec<String> = status.enclaves.iter().filter(asked).map(stand).collect();
    let mut reasons: Vec<String> = unready.iter().map(|enclave| stand(enclave)).collect();
    if !status.proxy.running {
        reasons.push("proxy: not running".to_owned());
    } else if !status.proxy.current {
        reasons.push("proxy: not on the current routes yet".to_owned());
    }
    let concerns = |about: &str| {
        names.is_empty()
            || names.iter().any(|name| name.as_str() == about)
            || !status.enclaves.iter().any(|enclave| enclave.name.as_str() == about)
    };
    // What an enclave's own line says already is not said twice.
    let new = |about: &Problem| !reasons.iter().any(|reason| reason.contains(&about.failure.message));
    let problems: Vec<_> = status.problems.iter().filter(|about| concerns(&about.about) && new(about)).collect();
    reasons.extend(problems.into_iter().flat_map(problem));
    Ok(Verdict::NotReady { lines, reasons })
}

/// Shows lines and what changes in them.
struct Progress<W> {
    to: W,
    show: Show,
    shown: Vec<String>,
}

impl<W: Write> Progress<W> {
    fn new(to: W, show: Show) -> Self {
        Self { to, show, shown: Vec::new() }
    }

    /// That it can't be shown is no reason to stop waiting.
    fn show(&mut self, lines: Vec<String>) {
        if lines == self.shown {
            return;
        }
        let mut text = String::new();
        if self.show.redraw && !self.shown.is_empty() {
            // Up to the first line shown, and clear all below.
            text.push_str(&format!("\x1b[{}A\x1b[J", self.shown.len()));
        }
        for line in lines.iter().filter(|line| self.show.redraw || !self.shown.contains(line)) {
            // One line each on the terminal, or the count of lines to go up would be wrong.
            text.push_str(&if self.show.redraw { super::text::cut(line, 79) } else { line.replace('\n', " ") });
            text.push('\n');
        }
        drop(self.to.write_all(text.as_bytes()).and_then(|()| self.to.flush()));
        self.shown = lines;
    }
}

#[cfg(test)]
mod tests {
    use super::super::status::tests::{enclave, sample};
    use super::*;
    use enclaved_core::failure::Failure;
    use enclaved_core::status::{FetchStage, FetchStatus};
    use serde_json::json;

    fn host(state: &str) -> Status {
        let mut status = sample(json!([enclave("signer", state), enclave("ledger", "ready")]));
        status.ready = state == "ready";
        status
    }

    /// Waits for what the looks show, one after another; the last one stays.
    async fn wait_through(looks: Vec<Result<Status, CtlError>>, names: &[&str], timeout: u64) -> Result<(), CtlError> {
        let names: Vec<_> = names.iter().map(|name| name.parse().unwrap()).collect();
        let mut looks = looks.into_iter().peekable();
        let look = async || {
            let look = looks.next().unwrap();
            if looks.peek().is_none() {
                looks = vec![look.clone()].into_iter().peekable();
            }
            look
        };
        until_ready(look, &names, Duration::from_secs(timeout), None::<Progress<Vec<u8>>>).await
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_as_soon_as_all_is_ready() {
        let began = Instant::now();
        wait_through(vec![Ok(host("fetching")), Ok(host("booting")), Ok(host("ready"))], &[], 300).await.unwrap();
        assert_eq!(began.elapsed(), 2 * PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_is_away_for_a_while_is_waited_for() {
        let away = Err(CtlError::TryAgain("not running".into()));
        wait_through(vec![away.clone(), Ok(host("booting")), away, Ok(host("ready"))], &[], 300).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_named_enclaves_are_waited_for() {
        wait_through(vec![Ok(host("booting"))], &["ledger"], 0).await.unwrap();
        assert_eq!(wait_through(vec![Ok(host("booting"))], &["signer"], 0).await.unwrap_err().code(), 75);
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_there_is_not_ends_the_wait_at_once() {
        let error = wait_through(vec![Ok(host("booting"))], &["singer"], 300).await.unwrap_err();
        assert_eq!(error, CtlError::Usage("there is no enclave \"singer\"; there are: signer, ledger".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn the_timeout_says_what_is_not_ready_and_why_and_what_to_do() {
        let began = Instant::now();
        let mut status = host("waiting");
        status.enclaves[0].waiting_for = Some("2 CPUs".into());
        status.proxy.current = false;
        let failure = Failure::new("only 2 CPUs").with_remedy("enlarge the pool");
        status.problems = vec![Problem { about: "host".into(), failure }];
        let error = wait_through(vec![Ok(status)], &[], 60).await.unwrap_err();
        assert!((Duration::from_secs(59)..=Duration::from_secs(60)).contains(&began.elapsed()));
        assert_eq!(
            error,
            CtlError::TryAgain(
                "not ready after 1m\n  signer: waiting: 2 CPUs\n  proxy: not on the current routes yet\n  \
                 host: only 2 CPUs\n    remedy: enlarge the pool"
                    .into()
            )
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_timeout_over_a_daemon_that_is_away_says_so() {
        let error = wait_through(vec![Err(CtlError::TryAgain("nobody\nanswers".into()))], &[], 1).await.unwrap_err();
        assert_eq!(error, CtlError::TryAgain("not ready after 1s\n  nobody\n  answers".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_hangs_does_not_outlast_the_timeout() {
        let began = Instant::now();
        let mut first = true;
        let look = async || {
            if !std::mem::take(&mut first) {
                std::future::pending::<()>().await;
            }
            Ok(host("booting"))
        };
        let waited = until_ready(look, &[], Duration::from_secs(5), None::<Progress<Vec<u8>>>).await;
        assert_eq!(waited.unwrap_err().code(), 75);
        assert_eq!(began.elapsed(), Duration::from_secs(5));
    }

    #[test]
    fn an_enclave_that_an_operator_keeps_stopped_is_not_waited_for_unless_named() {
        let mut status = host("held");
        status.ready = true;
        assert!(matches!(judge(&status, &[]), Ok(Verdict::Ready)));
        assert!(matches!(judge(&status, &["signer".parse().unwrap()]), Ok(Verdict::NotReady { .. })));
    }

    #[test]
    fn without_a_terminal_only_changes_are_shown() {
        let mut progress = Progress::new(Vec::new(), Show { redraw: false });
        let lines = |status: &Status| status.enclaves.iter().map(stand).collect::<Vec<_>>();
        let mut status = host("fetching");
        progress.show(lines(&status));
        status.enclaves[0].fetch = Some(FetchStatus {
            stage: FetchStage::Downloading,
            bytes: 1 << 20,
            total: 2 << 20,
            ..FetchStatus::default()
        });
        progress.show(lines(&status));
        progress.show(lines(&status));
        assert_eq!(
            String::from_utf8(progress.to).unwrap(),
            "signer: fetching\nledger: ready\nsigner: fetching: its image, 1.0 MiB of 2.0 MiB (50%)\n"
        );
    }

    #[test]
    fn on_a_terminal_lines_are_overwritten() {
        let mut progress = Progress::new(Vec::new(), Show { redraw: true });
        progress.show(vec!["a".into(), "b".into()]);
        progress.show(vec!["c".into()]);
        assert_eq!(String::from_utf8(progress.to).unwrap(), "a\nb\n\x1b[2A\x1b[Jc\n");
    }
}
