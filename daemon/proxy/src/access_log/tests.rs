use super::*;
use crate::limits::Limits;
use crate::shared::Shared;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri};
use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Instant;

/// No wait in a test is longer.
const DEADLINE: Duration = Duration::from_secs(20);

fn to(path: &Path) -> AccessLog {
    AccessLog::File(path.to_owned())
}

fn logs() -> AccessLogs {
    AccessLogs::new(Arc::new(Counters::new()))
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < DEADLINE, "not so after {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// What a client may say, as far as HTTP lets it through to a service.
fn said() -> impl Strategy<Value = Request<()>> {
    let method = "[!#$%&'*+.^_`|~0-9A-Za-z-]{1,80}";
    let path =
        prop_oneof![r#"/[ -~]{0,80}"#, "/[^\\x00-\\x20]{0,40}", "/[a\"\\\\<>{}^`|]{0,4000}", Just("*".to_owned())];
    let value = || prop::collection::vec(any::<u8>(), 0..2000);
    (method, path, value(), value(), prop::collection::vec(value(), 0..4)).prop_filter_map(
        "no request",
        |(method, path, host, agent, forwarded)| {
            let mut request = Request::new(());
            *request.method_mut() = Method::from_bytes(method.as_bytes()).ok()?;
            *request.uri_mut() = Uri::try_from(path).ok()?;
            let mut headers = HeaderMap::new();
            let named = [("host", vec![host]), ("user-agent", vec![agent]), ("x-forwarded-for", forwarded)];
            for (name, value) in
                named.into_iter().flat_map(|(name, values)| values.into_iter().map(move |one| (name, one)))
            {
                let allowed: Vec<u8> =
                    value.into_iter().filter(|byte| *byte == 9 || (*byte >= 32 && *byte != 127)).collect();
                headers.append(name, HeaderValue::from_bytes(&allowed).ok()?);
            }
            *request.headers_mut() = headers;
            Some(request)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn whatever_a_client_says_its_line_is_one_json_object_of_bounded_length(requests in prop::collection::vec(said(), 1..20)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let shared = Arc::new(Shared::new(Limits::default()));
            shared.access_log.set(Some(&to(&path)));
            for request in &requests {
                let mut entry = Entry::begin(&shared, Protocol::Https, "[::ffff:192.0.2.1]:5000".parse().unwrap());
                entry.asks(request);
                entry.forwarded(request.headers(), http::HeaderName::from_static("x-forwarded-for"));
                entry.request_id(&HeaderValue::from_static("r-1"));
                entry.answered(StatusCode::OK);
            }
            shared.access_log.finish(DEADLINE).await;
        });
        let text = read(&path);
        prop_assert!(text.ends_with('\n'));
        let lines: Vec<_> = text.split_terminator('\n').collect();
        prop_assert_eq!(lines.len(), requests.len());
        for (line, request) in lines.into_iter().zip(&requests) {
            prop_assert!(line.len() < 16 << 10, "{}", line.len());
            prop_assert!(!line.contains(char::is_control), "{}", line);
            let object: Value = serde_json::from_str(line).unwrap();
            let object = object.as_object().unwrap();
            prop_assert_eq!(&object["client"], "192.0.2.1");
            let path = object["path"].as_str().unwrap();
            prop_assert!(!path.contains('?') && path.chars().count() <= 2049);
            if request.uri().path().len() <= 2048 && !request.uri().path().contains(char::is_control) {
                prop_assert_eq!(path, request.uri().path());
            }
        }
    }
}

#[tokio::test]
async fn a_file_that_was_moved_away_or_removed_is_made_again_and_each_line_is_in_one_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let (path, moved) = (dir.path().join("access.log"), dir.path().join("access.log.1"));
    let logs = logs();
    logs.set(Some(&to(&path)));
    logs.push(b"1\n");
    until("the first is written", || read(&path) == "1\n");
    fs::rename(&path, &moved).unwrap();
    logs.push(b"2\n");
    until("the second is written", || read(&path) == "2\n");
    fs::remove_file(&path).unwrap();
    logs.push(b"3\n");
    logs.finish(DEADLINE).await;
    assert_eq!((read(&moved).as_str(), read(&path).as_str(), logs.dropped()), ("1\n", "3\n", 0));
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o137, 0, "others than its owner and group can't read it: {mode:o}");
}

#[tokio::test]
async fn a_full_disk_loses_lines_and_says_so_and_lines_are_written_again_when_it_is_mended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("not-there-yet").join("access.log");
    let logs = logs();
    logs.set(Some(&to(Path::new("/dev/full"))));
    let mut changes = logs.counters.sequence();
    changes.mark_unchanged();
    logs.push(b"1\n");
    logs.push(b"2\n");
    until("they are lost", || logs.dropped() == 2);
    let trouble = logs.trouble().unwrap();
    assert!(trouble.contains("/dev/full") && trouble.contains("No space left"), "{trouble}");
    until("whoever watches is told", || changes.has_changed().unwrap());
    logs.set(Some(&to(&path)));
    assert_eq!(logs.trouble(), None, "that was of the other");
    logs.push(b"3\n");
    until("it is lost", || logs.dropped() == 3);
    assert!(logs.trouble().unwrap().contains("not-there-yet"), "{:?}", logs.trouble());
    fs::create_dir(path.parent().unwrap()).unwrap();
    logs.push(b"4\n");
    until("it is written", || read(&path) == "4\n");
    until("all is well", || logs.trouble().is_none());
}

#[tokio::test]
async fn nobody_waits_for_a_disk_that_hangs_and_what_it_does_not_take_in_time_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (pipe, other) = (dir.path().join("pipe"), dir.path().join("other"));
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let mut logs = logs();
    logs.slow = Duration::from_millis(50);
    logs.set(Some(&to(&pipe)));
    let line = [vec![b'x'; 999], vec![b'\n']].concat();
    let (began, mut lines) = (Instant::now(), 0);
    // Until it is full, and what can be on its way.
    while logs.dropped() < 1000 {
        logs.push(&line);
        lines += 1;
        assert!(began.elapsed() < DEADLINE);
    }
    assert!(lines < 20_000, "{lines} lines of 1000 bytes, and memory is bounded");
    until("it is told", || logs.trouble().is_some_and(|trouble| trouble.contains("taken nothing")));
    logs.look();

    // Another place is written to at once; and what waits there, when it goes on.
    logs.set(Some(&to(&other)));
    logs.push(b"1\n");
    until("the other is written", || read(&other) == "1\n");
    let expected = lines - logs.dropped();
    let reader = std::thread::spawn(move || {
        let lines = BufReader::new(fs::File::open(pipe).unwrap()).lines();
        lines.inspect(|line| assert_eq!(line.as_ref().unwrap().len(), 999)).count() as u64
    });
    logs.finish(DEADLINE).await;
    assert_eq!(reader.join().unwrap(), expected);
}

#[tokio::test]
async fn places_that_hang_bind_so_many_threads_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let pipes: Vec<_> = (0..=WRITERS).map(|number| dir.path().join(number.to_string())).collect();
    let logs = logs();
    let full = vec![b'\n'; 128 << 10];
    for pipe in &pipes[..WRITERS] {
        mknodat(CWD, pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        logs.set(Some(&to(pipe)));
        logs.push(&full);
    }
    logs.set(Some(&to(&pipes[WRITERS])));
    assert!(logs.trouble().unwrap().contains("hang"), "{:?}", logs.trouble());
    logs.push(b"1\n");
    assert_eq!(logs.dropped(), 1);
    let readers = pipes[..WRITERS].iter().map(|pipe| {
        let pipe = fs::File::open(pipe).unwrap();
        std::thread::spawn(move || assert_eq!(std::io::copy(&mut { pipe }, &mut std::io::sink()).unwrap(), 128 << 10))
    });
    readers.collect::<Vec<_>>().into_iter().for_each(|reader| reader.join().unwrap());
    until("there is room for another", || {
        logs.look();
        logs.trouble().is_none()
    });
    logs.push(b"2\n");
    logs.finish(DEADLINE).await;
    assert_eq!(read(&pipes[WRITERS]), "2\n");
}

#[tokio::test]
async fn half_a_line_that_a_killed_process_left_spoils_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.log");
    fs::write(&path, "1\n{\"half").unwrap();
    let logs = logs();
    logs.set(Some(&to(&path)));
    logs.push(b"2\n");
    logs.finish(DEADLINE).await;
    assert_eq!(read(&path), "1\n{\"half\n2\n");
}

#[tokio::test]
async fn an_entry_that_is_begun_while_the_log_is_off_has_no_line_and_one_that_ends_then_neither() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.log");
    let shared = Arc::new(Shared::new(Limits::default()));
    let begin = || Entry::begin(&shared, Protocol::Tcp, "192.0.2.1:5000".parse().unwrap());
    let before = begin();
    shared.access_log.set(Some(&to(&path)));
    let within = begin();
    let late = begin();
    drop((before, within));
    shared.access_log.finish(DEADLINE).await;
    drop(late);
    let text = read(&path);
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&line["protocol"], &line["ended"]), (&"tcp".into(), &"client".into()), "{text}");
    assert_eq!(shared.access_log.dropped(), 0);
}
