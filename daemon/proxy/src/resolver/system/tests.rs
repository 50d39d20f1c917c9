use super::*;
use crate::resolver::Resolver as Names;
use crate::resolver::nameservers::HALF;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use tempfile::TempDir;
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// What a nameserver does with a question.
#[derive(Debug, Clone)]
enum Does {
    /// Answers with these addresses and this TTL; with nothing where none is of the family that is asked for.
    Answers(&'static [&'static str], u32),
    /// Says that there is no such name.
    Denies,
    /// Says that something is wrong with it.
    Fails,
    /// Says nothing.
    KeepsSilent,
    /// Answers the second question of all, of whichever family, this much later.
    IsSlow(Duration),
    /// Says nothing when asked for AAAA.
    DropsIpv6,
    /// Does not want to be asked.
    Refuses,
    /// Does this for these names, and denies the others.
    Knows(&'static [(&'static str, Does)]),
}

/// A nameserver on a port of its own, and the files of a host that asks it.
struct Server {
    does: Arc<Mutex<Does>>,
    questions: Arc<AtomicUsize>,
    dir: TempDir,
    port: u16,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(does: Does) -> Self {
        Self::start_at("127.0.0.1:0", does).await
    }

    async fn start_at(address: &str, does: Does) -> Self {
        let socket = Arc::new(UdpSocket::bind(address).await.unwrap());
        let port = socket.local_addr().unwrap().port();
        let (does, questions) = (Arc::new(Mutex::new(does)), Arc::new(AtomicUsize::new(0)));
        let (doing, counted) = (does.clone(), questions.clone());
        let task = tokio::spawn(async move {
            let mut packet = [0; 1500];
            loop {
                let (length, from) = socket.recv_from(&mut packet).await.unwrap();
                counted.fetch_add(1, SeqCst);
                let does = doing.lock().unwrap().clone();
                let (question, socket) = (packet[..length].to_vec(), socket.clone());
                tokio::spawn(async move {
                    if let Some(answer) = answer(&question, &does).await {
                        socket.send_to(&answer, from).await.unwrap();
                    }
                });
            }
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("hosts"), "").unwrap();
        let server = Self { does, questions, dir, port, task };
        server.write("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n");
        server
    }

    fn set(&self, does: Does) {
        *self.does.lock().unwrap() = does;
    }

    /// Replaces a file of the host, as tools do: another file takes its name.
    fn write(&self, name: &str, text: &str) {
        let new = self.dir.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.dir.path().join(name)).unwrap();
    }

    fn system(&self) -> System {
        System::new(self.dir.path().join("resolv.conf"), self.dir.path().join("hosts"), Some(self.port))
    }
}

async fn answer(question: &[u8], does: &Does) -> Option<Vec<u8>> {
    // Header of 12 bytes, the name up to its zero, type and class; what follows (EDNS) is left out of the answer.
    let end = 12 + question[12..].iter().position(|byte| *byte == 0)? + 5;
    let v6 = question[end - 4..end - 2] == [0, 28];
    let does = match does {
        Does::Knows(names) => {
            names.iter().find(|(name, _)| *name == asked_for(question)).map_or(&Does::Denies, |(_, does)| does)
        }
        does => does,
    };
    let (addresses, ttl, code): (&[&str], u32, u8) = match does {
        Does::Answers(addresses, ttl) => (addresses, *ttl, 0),
        Does::Denies | Does::Knows(_) => (&[], 0, 3),
        Does::Refuses => (&[], 0, 5),
        Does::Fails => (&[], 0, 2),
        Does::KeepsSilent => return None,
        Does::IsSlow(time) => {
            sleep(*time).await;
            (&["10.0.0.1", "2600::1"], 60, 0)
        }
        Does::DropsIpv6 if v6 => return None,
        Does::DropsIpv6 => (&["10.0.0.1"], 60, 0),
    };
    let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
    let addresses: Vec<_> = addresses.into_iter().filter(|address| address.is_ipv6() == v6).collect();
    let mut answer = question[..end].to_vec();
    answer[2..4].copy_from_slice(&[0x81, 0x80 | code]);
    answer[6..12].copy_from_slice(&[0, u8::try_from(addresses.len()).unwrap(), 0, 0, 0, 0]);
    for address in addresses {
        let bytes = match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        answer.extend_from_slice(&[0xc0, 12, 0, if v6 { 28 } else { 1 }, 0, 1]);
        answer.extend_from_slice(&ttl.to_be_bytes());
        answer.extend_from_slice(&u16::try_from(bytes.len()).unwrap().to_be_bytes());
        answer.extend_from_slice(&bytes);
    }
    Some(answer)
}

/// The name in a question, without the last dot.
fn asked_for(question: &[u8]) -> String {
    let (mut name, mut rest) = (Vec::new(), &question[12..]);
    while let Some((&length, more)) = rest.split_first().filter(|(length, _)| **length > 0) {
        let (label, more) = more.split_at(usize::from(length));
        name.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        rest = more;
    }
    name.join(".")
}

fn said(addresses: &[&str], ttl: u64) -> Result<Said, NameError> {
    let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
    Ok(Said { addresses, ttl: Duration::from_secs(ttl) })
}

#[tokio::test]
async fn both_families_are_asked_for_and_the_shorter_ttl_counts() {
    let server = Server::start(Does::Answers(&["10.0.0.1", "2600::1", "10.0.0.2"], 7)).await;
    let system = server.system();
    assert_eq!(system.resolve("db.example.com").await, said(&["2600::1", "10.0.0.1", "10.0.0.2"], 7));
    assert_eq!(server.questions.load(SeqCst), 2);
    server.set(Does::Answers(&["10.0.0.3"], 60));
    assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.3"], 60));
}

#[tokio::test]
async fn that_there_is_no_such_name_is_told_from_a_name_without_addresses_and_from_no_answer() {
    let server = Server::start(Does::Denies).await;
    let system = server.system();
    let asked = system.resolve("db.example.com").await.unwrap_err();
    assert!(matches!(asked, NameError::NoSuchName { .. }), "{asked:?}");
    server.set(Does::Answers(&[], 60));
    let asked = system.resolve("db.example.com").await.unwrap_err();
    assert!(matches!(asked, NameError::NoAddress { .. }), "{asked:?}");
    for does in [Does::Fails, Does::KeepsSilent] {
        server.set(does);
        let asked = system.resolve("db.example.com").await.unwrap_err();
        assert!(matches!(asked, NameError::Failed(_)), "{asked:?}");
    }
}

#[tokio::test]
async fn a_network_that_drops_questions_for_ipv6_holds_nothing_up_for_long() {
    let server = Server::start(Does::DropsIpv6).await;
    let asked = timeout(Duration::from_millis(900), server.system().resolve("db.example.com")).await;
    assert_eq!(asked.expect("the dropped question was waited for"), said(&["10.0.0.1"], HALF.as_secs()));
}

#[tokio::test]
async fn the_hosts_file_comes_first_and_each_change_of_it_counts() {
    let server = Server::start(Does::Answers(&["10.0.0.1"], 60)).await;
    let system = server.system();
    assert!(!system.changed(), "nothing was asked yet");
    assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60));
    server.write("hosts", "10.7.7.7 db.example.com\n");
    assert!(system.changed());
    assert_eq!(system.resolve("DB.example.com.").await, said(&["10.7.7.7"], OF_HOSTS.as_secs()));
    assert!(!system.changed());
    std::fs::remove_file(server.dir.path().join("hosts")).unwrap();
    assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60));
}

#[tokio::test]
async fn a_new_resolv_conf_is_used_and_one_that_is_being_written_is_not() {
    let server = Server::start(Does::Answers(&["10.0.0.1"], 60)).await;
    // Nobody answers on that address.
    server.write("resolv.conf", "nameserver 127.0.0.2\noptions timeout:1 attempts:1\n");
    let system = server.system();
    assert!(matches!(system.resolve("db.example.com").await, Err(NameError::Failed(_))));
    server.write("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n");
    assert!(system.changed());
    assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60));
    for broken in ["", "# nameserver 127.0.0.2\n", "nameserver nonsense\n"] {
        server.write("resolv.conf", broken);
        assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60), "{broken:?}");
    }
    std::fs::remove_file(server.dir.path().join("resolv.conf")).unwrap();
    assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60), "without the file");
}

#[tokio::test]
async fn a_slow_nameserver_delays_the_first_connection_alone_and_a_dead_one_none() {
    let server = Server::start(Does::IsSlow(Duration::from_millis(300))).await;
    let names = Names::asking(server.system());
    let name = names.name("db.example.com");
    let patience = Duration::from_secs(5);
    let began = std::time::Instant::now();
    assert_eq!(name.addresses(patience).await.unwrap().len(), 2);
    assert!(began.elapsed() >= Duration::from_millis(300));
    server.set(Does::KeepsSilent);
    server.write("resolv.conf", "nameserver 127.0.0.2\n");
    names.look();
    for _ in 0..100 {
        let began = std::time::Instant::now();
        assert_eq!(name.addresses(patience).await.unwrap().len(), 2);
        assert!(began.elapsed() < Duration::from_millis(100), "a connection waited for a dead nameserver");
    }
}

const SEARCHING: &str = "nameserver 127.0.0.1\nsearch a.test b.test\noptions timeout:1 attempts:1\n";

#[tokio::test]
async fn a_name_with_a_dot_is_not_searched_for_so_that_its_last_answer_stays_when_it_alone_fails() {
    let server = Server::start(Does::Knows(&[("db.example.com", Does::Answers(&["10.0.0.1"], 60))])).await;
    server.write("resolv.conf", SEARCHING);
    let names = Names::asking(server.system());
    let name = names.name("db.example.com");
    let patience = Duration::from_secs(5);
    name.addresses(patience).await.unwrap();
    server.set(Does::Knows(&[("db.example.com", Does::Fails)]));
    server.write("resolv.conf", SEARCHING);
    names.look();
    let failed = async {
        while names.report()[0].failed == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(patience, failed).await.expect("the name was not asked for again");
    assert_eq!(*name.addresses(patience).await.unwrap(), ["10.0.0.1".parse::<IpAddr>().unwrap()]);
}

#[tokio::test]
async fn the_addresses_of_both_families_are_those_of_one_name() {
    let server = Server::start(Does::Knows(&[
        ("db.example.com", Does::Answers(&["10.0.0.1"], 60)),
        ("db.example.com.a.test", Does::Answers(&["2600::1"], 60)),
        ("db.a.test", Does::Answers(&["10.0.0.2"], 60)),
        ("db.b.test", Does::Answers(&["2600::2"], 60)),
    ]))
    .await;
    server.write("resolv.conf", SEARCHING);
    let system = server.system();
    assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60));
    assert_eq!(system.resolve("db").await, said(&["10.0.0.2"], 60));
}

#[tokio::test]
async fn a_name_without_a_dot_is_searched_for_until_nobody_knows_whether_it_exists() {
    let server = Server::start(Does::Knows(&[("db.b.test", Does::Answers(&["10.0.0.2"], 60))])).await;
    server.write("resolv.conf", SEARCHING);
    let system = server.system();
    assert_eq!(system.resolve("db").await, said(&["10.0.0.2"], 60));
    server.set(Does::Knows(&[("db", Does::Answers(&["10.0.0.3"], 60))]));
    assert_eq!(system.resolve("db").await, said(&["10.0.0.3"], 60));
    server.set(Does::Knows(&[("db.a.test", Does::Answers(&[], 60))]));
    let asked = system.resolve("db").await.unwrap_err();
    assert!(matches!(asked, NameError::NoAddress { .. }), "{asked:?}");
    server.set(Does::Denies);
    let asked = system.resolve("db").await.unwrap_err();
    assert!(matches!(asked, NameError::NoSuchName { .. }), "{asked:?}");
    server.set(Does::Knows(&[("db.a.test", Does::Fails), ("db.b.test", Does::Answers(&["10.0.0.2"], 60))]));
    let asked = system.resolve("db").await.unwrap_err();
    assert!(matches!(asked, NameError::Failed(_)), "{asked:?}");
}

#[tokio::test]
async fn the_next_nameserver_is_asked_when_one_does_not_answer_the_question() {
    let server = Server::start(Does::Refuses).await;
    let next = Server::start_at(&format!("127.0.0.2:{}", server.port), Does::Answers(&["10.0.0.1"], 60)).await;
    server.write("resolv.conf", "nameserver 127.0.0.1\nnameserver 127.0.0.2\noptions timeout:1 attempts:1\n");
    let system = server.system();
    for does in [Does::Refuses, Does::Fails, Does::KeepsSilent] {
        server.set(does.clone());
        assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60), "{does:?}");
    }
    let asked = next.questions.load(SeqCst);
    for does in [Does::Answers(&["10.0.0.2"], 60), Does::Denies] {
        server.set(does);
        // The one that answered last is asked first.
        let system = server.system();
        assert_ne!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60));
    }
    assert_eq!(next.questions.load(SeqCst), asked, "the second was asked though the first answered");
}

#[tokio::test]
async fn a_silent_nameserver_delays_one_question_by_a_second_and_those_after_it_not_at_all() {
    let silent = Server::start(Does::KeepsSilent).await;
    let answering = Server::start_at(&format!("127.0.0.2:{}", silent.port), Does::Answers(&["10.0.0.1"], 60)).await;
    // Each of them has five seconds.
    silent.write("resolv.conf", "nameserver 127.0.0.1\nnameserver 127.0.0.2\noptions timeout:5\n");
    let system = silent.system();
    let second = Duration::from_secs(1);
    let ask = async |within: Duration| {
        let began = std::time::Instant::now();
        let answer =
            timeout(within, system.resolve("db.example.com")).await.expect("it waited for a silent nameserver");
        assert_eq!(answer, said(&["10.0.0.1"], 60));
        began.elapsed()
    };
    let first = ask(4 * second).await;
    assert!(first >= second, "the second was asked after {first:?}");
    let asked = silent.questions.load(SeqCst);
    for _ in 0..5 {
        ask(second).await;
    }
    assert_eq!(silent.questions.load(SeqCst), asked, "the silent one is still asked first");
    // Nor for ever: when the other falls silent, the first has its turn again.
    silent.set(Does::Answers(&["10.0.0.1"], 60));
    answering.set(Does::KeepsSilent);
    ask(4 * second).await;
    ask(second).await;
}

#[tokio::test]
async fn the_hosts_file_that_was_read_last_counts_while_it_can_not_be_read() {
    let server = Server::start(Does::Answers(&["10.0.0.1"], 60)).await;
    server.write("hosts", "10.7.7.7 db.example.com\n");
    let system = server.system();
    assert_eq!(system.resolve("db.example.com").await, said(&["10.7.7.7"], OF_HOSTS.as_secs()));
    std::fs::remove_file(server.dir.path().join("hosts")).unwrap();
    std::fs::create_dir(server.dir.path().join("hosts")).unwrap();
    assert_eq!(system.resolve("db.example.com").await, said(&["10.7.7.7"], OF_HOSTS.as_secs()));
    std::fs::remove_dir(server.dir.path().join("hosts")).unwrap();
    assert_eq!(system.resolve("db.example.com").await, said(&["10.0.0.1"], 60));
}

#[tokio::test]
async fn a_changed_file_that_could_not_be_read_is_read_at_the_next_question() {
    let server = Server::start(Does::Answers(&["10.0.0.1"], 60)).await;
    server.write("hosts", "10.7.7.7 db.example.com\n");
    server.write("resolv.conf", "nameserver 127.0.0.2\noptions timeout:1 attempts:1\n");
    let mut system = server.system();
    system.read = |path| match path.with_file_name("unreadable").exists() {
        true => Err(std::io::Error::other("too many open files")),
        false => read(path),
    };
    assert_eq!(system.resolve("db.example.com").await, said(&["10.7.7.7"], OF_HOSTS.as_secs()));
    server.write("unreadable", "");
    server.write("hosts", "10.7.7.8 db.example.com\n");
    server.write("resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n");
    assert!(system.changed());
    assert_eq!(system.resolve("db.example.com").await, said(&["10.7.7.7"], OF_HOSTS.as_secs()));
    assert!(!system.changed(), "a file that can't be read was told of twice");
    std::fs::remove_file(server.dir.path().join("unreadable")).unwrap();
    assert_eq!(system.resolve("db.example.com").await, said(&["10.7.7.8"], OF_HOSTS.as_secs()));
    assert_eq!(system.resolve("other.example.com").await, said(&["10.0.0.1"], 60));
    assert!(system.changed(), "names that were asked for meanwhile are not asked for again");
    assert!(!system.changed());
}

#[tokio::test]
async fn a_change_is_told_once_whether_or_not_a_name_was_asked_for_since() {
    let server = Server::start(Does::Answers(&["10.0.0.1"], 60)).await;
    let system = server.system();
    system.resolve("db.example.com").await.unwrap();
    assert!(!system.changed());
    server.write("hosts", "10.7.7.7 db.example.com\n");
    assert!(system.changed());
    assert!(!system.changed(), "the same change was told twice");
    server.write("hosts", "10.7.7.8 db.example.com\n");
    system.resolve("db.example.com").await.unwrap();
    assert!(system.changed(), "one name was asked for since, and the others were not");
}

#[test]
fn a_hosts_file_is_read_as_far_as_it_makes_sense() {
    let text = "127.0.0.1 localhost\n# 10.0.0.9 no\n10.0.0.1\tDB.example.com. db # primary\n::1 localhost\nnonsense db\n10.0.0.1 db\nfe80::1%eth0 x\n";
    let hosts = parse_hosts(text);
    let of = |name: &str| hosts.get(name).map(|found| found.iter().map(ToString::to_string).collect::<Vec<_>>());
    assert_eq!(of("localhost").unwrap(), ["127.0.0.1", "::1"]);
    assert_eq!(of("db.example.com").unwrap(), ["10.0.0.1"]);
    assert_eq!(of("db").unwrap(), ["10.0.0.1"]);
    assert_eq!((of("no"), of("x")), (None, None));
}
