//! The client against a bus of a few lines: it plays the bus and systemd behind it, as far as a test says.

use super::*;
use futures_util::StreamExt;
use std::collections::VecDeque;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use zbus::{Guid, MessageStream};

const OWNER: &str = ":1.0";
const SOON: Duration = Duration::from_secs(20);

/// What systemd does when it is asked to do something with a unit.
#[derive(Debug, Clone)]
enum Does {
    /// It answers with a job, after this end of another one of the same unit and before that end of it, from that sender.
    Job(&'static str, &'static str),
    /// It answers with this error.
    Error(&'static str),
    /// It answers with a job of which nothing more is heard.
    Begins,
    /// It hangs up.
    HangsUp,
    /// It hangs up after it has answered with a job.
    Dies,
}

/// A bus with a systemd.
struct Bus {
    folder: TempDir,
    calls: mpsc::UnboundedReceiver<String>,
    signals: mpsc::UnboundedSender<Message>,
    _task: Task,
}

impl Bus {
    fn new(does: impl IntoIterator<Item = Does>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("bus")).unwrap();
        let (call_sender, calls) = mpsc::unbounded_channel();
        let (signals, mut signal_receiver) = mpsc::unbounded_channel();
        let mut does: VecDeque<Does> = does.into_iter().collect();
        let task = Task(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serve(stream, &mut does, &call_sender, &mut signal_receiver).await;
            }
        }));
        Self { folder, calls, signals, _task: task }
    }

    fn client(&self) -> SystemdBus {
        SystemdBus::with_address(format!("unix:path={}", self.folder.path().join("bus").display()))
    }

    /// The next call that is none of setting up the connection.
    async fn call(&mut self) -> String {
        timeout(SOON, self.calls.recv()).await.unwrap().unwrap()
    }
}

/// Serves one connection until it is over.
async fn serve(
    stream: tokio::net::UnixStream,
    does: &mut VecDeque<Does>,
    calls: &mpsc::UnboundedSender<String>,
    signals: &mut mpsc::UnboundedReceiver<Message>,
) {
    let builder = zbus::connection::Builder::unix_stream(stream.into_std().unwrap()).server(Guid::generate()).p2p();
    let Ok(connection) = builder.build().await else { return };
    let mut messages = MessageStream::from(&connection);
    loop {
        let message = tokio::select! {
            // Both are cancel-safe: a message that is not taken stays where it is.
            message = messages.next() => message,
            Some(signal) = signals.recv() => {
                connection.send(&signal).await.unwrap();
                continue;
            }
        };
        let Some(Ok(message)) = message else { return };
        if message.message_type() != zbus::message::Type::MethodCall {
            continue;
        }
        let header = message.header();
        let method = header.member().unwrap().to_string();
        match method.as_str() {
            "Hello" => connection.reply(&header, &":1.7").await.unwrap(),
            "GetNameOwner" => connection.reply(&header, &OWNER).await.unwrap(),
            "AddMatch" | "Subscribe" => connection.reply(&header, &()).await.unwrap(),
            "StartUnit" | "StopUnit" | "RestartUnit" | "ResetFailedUnit" => {
                let body = message.body();
                let unit: String = match method.as_str() {
                    "ResetFailedUnit" => body.deserialize().unwrap(),
                    _ => body.deserialize::<(String, String)>().unwrap().0,
                };
                calls.send(format!("{method} {unit}")).unwrap();
                let job = OwnedObjectPath::try_from("/org/freedesktop/systemd1/job/7").unwrap();
                match does.pop_front().unwrap() {
                    Does::Job(result, sender) => {
                        connection
                            .send(&removed(OWNER, "/org/freedesktop/systemd1/job/6", &unit, "failed"))
                            .await
                            .unwrap();
                        connection.send(&removed(sender, job.as_str(), &unit, result)).await.unwrap();
                        connection.reply(&header, &job).await.unwrap();
                    }
                    Does::Error(name) => connection.reply_error(&header, name, &"why").await.unwrap(),
                    Does::Begins => connection.reply(&header, &job).await.unwrap(),
                    Does::HangsUp => return,
                    Does::Dies => {
                        connection.reply(&header, &job).await.unwrap();
                        return;
                    }
                }
            }
            other => panic!("{other}"),
        }
    }
}

fn signal<'a>(sender: &'a str, path: &'a str, interface: &'a str, name: &'a str) -> zbus::message::Builder<'a> {
    Message::signal(path, interface, name).sender(sender)
}

fn removed(sender: &str, job: &str, unit: &str, result: &str) -> Message {
    let job = OwnedObjectPath::try_from(job).unwrap();
    signal(sender, MANAGER_PATH, MANAGER, "JobRemoved").build(&(7_u32, job, unit, result)).unwrap()
}

fn properties_changed(sender: &str, unit: &str) -> Message {
    let path = format!("{UNITS_PATH}{}", label(unit));
    let nothing: (&str, BTreeMap<String, OwnedVariant>, Vec<String>) =
        ("org.freedesktop.systemd1.Unit", BTreeMap::new(), Vec::new());
    signal(sender, &path, PROPERTIES, "PropertiesChanged").build(&nothing).unwrap()
}

fn denied() -> &'static str {
    "org.freedesktop.DBus.Error.AccessDenied"
}

#[tokio::test]
async fn a_job_is_over_when_systemd_says_so_of_that_very_job() {
    let mut bus = Bus::new([Does::Job("done", OWNER), Does::Job("failed", OWNER), Does::Job("dependency", OWNER)]);
    let client = bus.client();
    client.run_job(Verb::Restart, "x.service", SOON).await.unwrap();
    assert!(matches!(client.run_job(Verb::Start, "x.service", SOON).await, Err(JobError::Failed(_))));
    assert!(matches!(client.run_job(Verb::Stop, "x.service", SOON).await, Err(JobError::NotRun(_))));
    for expected in ["RestartUnit x.service", "StartUnit x.service", "StopUnit x.service"] {
        assert_eq!(bus.call().await, expected);
    }
}

#[tokio::test]
async fn a_signal_of_somebody_else_ends_no_job() {
    let bus = Bus::new([Does::Job("done", ":1.66")]);
    let client = bus.client();
    let waited = client.run_job(Verb::Start, "x.service", Duration::from_millis(200)).await;
    let Err(JobError::Unknown(failure)) = waited else { panic!("{waited:?}") };
    assert!(failure.message.contains("was not over within"), "{failure}");
}

#[tokio::test]
async fn what_becomes_of_a_job_is_unknown_once_the_connection_is_lost_and_the_next_call_makes_a_new_one() {
    let bus = Bus::new([Does::Dies, Does::HangsUp, Does::Begins, Does::Job("done", OWNER)]);
    let client = bus.client();
    for _ in 0..2 {
        let lost = timeout(SOON, client.run_job(Verb::Start, "x.service", SOON * 9)).await.unwrap();
        assert!(matches!(lost, Err(JobError::Unknown(_))), "{lost:?}");
    }
    client.enqueue(Verb::Start, "x.service").await.unwrap();
    client.run_job(Verb::Start, "x.service", SOON).await.unwrap();
}

#[tokio::test]
async fn a_refusal_says_what_to_do_about_it() {
    let bus = Bus::new([
        Does::Error(denied()),
        Does::Error("org.freedesktop.systemd1.NoSuchUnit"),
        Does::Error("org.freedesktop.systemd1.UnitMasked"),
        Does::Error("org.freedesktop.DBus.Error.ServiceUnknown"),
        Does::Error("org.freedesktop.systemd1.NoSuchUnit"),
        Does::Error(denied()),
    ]);
    let client = bus.client();
    for part in ["polkit", "unit file", "unmask", "supervisor = \"direct\""] {
        let refused = client.enqueue(Verb::Start, "enclave@signer-3.service").await;
        let Err(JobError::NotRun(failure)) = refused else { panic!("{refused:?}") };
        assert!(failure.message.starts_with("starting enclave@signer-3.service: "), "{failure}");
        assert!(failure.remedy.as_ref().is_some_and(|remedy| remedy.contains(part)), "{failure:?}");
    }
    client.reset_failed("x.service").await.unwrap();
    assert!(client.reset_failed("x.service").await.unwrap_err().remedy.unwrap().contains("polkit"));
}

#[tokio::test]
async fn nothing_but_the_name_of_a_service_reaches_the_bus() {
    let mut bus = Bus::new([Does::Begins]);
    let client = bus.client();
    let long = format!("{}.service", "x".repeat(250));
    for name in [
        "",
        ".service",
        "@x.service",
        "x.mount",
        "a/b.service",
        "a b.service",
        "a\n.service",
        "ä.service",
        "*.service",
        &long,
    ] {
        assert!(matches!(client.enqueue(Verb::Start, name).await, Err(JobError::NotRun(_))), "{name}");
        client.unit(name).await.unwrap_err();
        client.service(name).await.unwrap_err();
        client.reset_failed(name).await.unwrap_err();
    }
    for prefix in ["", "enclave[", "*", "?"] {
        client.changes(prefix).unwrap_err();
        client.units(prefix).await.unwrap_err();
    }
    client.enqueue(Verb::Start, "enclave@a-b-3.service").await.unwrap();
    assert_eq!(bus.call().await, "StartUnit enclave@a-b-3.service", "the first that reached it");
}

#[tokio::test]
async fn news_of_units_with_that_prefix_wake_and_no_others_do() {
    let bus = Bus::new([]);
    let client = bus.client();
    let mut changes = client.changes("enclave@").unwrap();
    // The connection is made.
    timeout(SOON, changes.changed()).await.unwrap().unwrap();
    for (message, wakes) in [
        (properties_changed(OWNER, "enclave@signer-3.service"), true),
        (properties_changed(OWNER, "enclaved.service"), false),
        (properties_changed(":1.66", "enclave@signer-3.service"), false),
        (removed(OWNER, "/org/freedesktop/systemd1/job/9", "enclave@signer-3.service", "done"), true),
        (removed(OWNER, "/org/freedesktop/systemd1/job/9", "ssh.service", "done"), false),
        (signal(OWNER, MANAGER_PATH, MANAGER, "Reloading").build(&(false,)).unwrap(), true),
    ] {
        changes.mark_unchanged();
        let before = *changes.borrow();
        bus.signals.send(message.clone()).unwrap();
        // Signals come one after the other, so after this one the one before was taken in.
        bus.signals.send(properties_changed(OWNER, "enclave@last-1.service")).unwrap();
        let expected = before + if wakes { 2 } else { 1 };
        timeout(SOON, changes.wait_for(|count| *count >= expected)).await.unwrap().unwrap();
        assert_eq!(*changes.borrow(), expected, "{message:?}");
    }
}

#[tokio::test]
async fn a_systemd_that_was_executed_anew_is_subscribed_to_again() {
    let bus = Bus::new([Does::Job("done", OWNER)]);
    let client = bus.client();
    let mut changes = client.changes("enclave@").unwrap();
    timeout(SOON, changes.changed()).await.unwrap().unwrap();
    let body = (SYSTEMD, OWNER, ":1.9");
    bus.signals.send(signal(BUS, "/org/freedesktop/DBus", BUS, "NameOwnerChanged").build(&body).unwrap()).unwrap();
    // Lost, and found again.
    let before = *changes.borrow_and_update();
    timeout(SOON, changes.wait_for(|count| *count >= before + 2)).await.unwrap().unwrap();
    client.run_job(Verb::Start, "x.service", SOON).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn without_a_bus_nothing_is_done_and_the_remedy_is_the_other_supervisor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none");
    let client = SystemdBus::with_address(format!("unix:path={}", path.display()));
    assert!(client.check().await.unwrap_err().remedy.unwrap().contains("supervisor = \"direct\""));
    let Err(JobError::NotRun(_)) = client.run_job(Verb::Start, "x.service", SOON).await else { panic!() };
    // One that accepts and never says anything.
    let _silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let failure = client.check().await.unwrap_err();
    assert!(failure.message.contains("did not answer within 10 s"), "{failure}");
}

#[test]
fn a_job_that_was_cancelled_or_timed_out_may_still_do_something() {
    let says = |result| of_job(Verb::Start, "x.service", result);
    assert_eq!(says("done"), Ok(()));
    assert!(matches!(says("failed"), Err(JobError::Failed(_))));
    assert!(matches!(says("dependency"), Err(JobError::NotRun(_))));
    for result in ["canceled", "timeout", "something new"] {
        assert!(matches!(says(result), Err(JobError::Unknown(_))), "{result}");
    }
}

#[test]
fn an_answer_of_systemd_is_a_refusal_and_a_lost_one_is_not() {
    let call = Message::method_call("/a", "RestartUnit").build(&()).unwrap();
    let answer = |name: &str| zbus::Error::from(Message::error(&call.header(), name).build(&("why",)).unwrap());
    for name in ["org.freedesktop.systemd1.NoSuchUnit", "org.freedesktop.systemd1.UnitMasked", denied()] {
        assert!(refused(&answer(name)), "{name}");
    }
    assert!(!refused(&answer("org.freedesktop.DBus.Error.NoReply")));
    assert!(!refused(&zbus::Error::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset))));
}

#[test]
fn a_name_in_a_path_is_escaped_as_systemd_does_it() {
    assert_eq!(label("enclave@signer-3.service"), "enclave_40signer_2d3_2eservice");
    assert_eq!(label("3x"), "_33x");
}
