use super::*;
use crate::limits::Limits;
use crate::manager::Manager;
use rustix::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::UnixDatagram;
use tokio::time::{Instant, timeout};

type Accepts = Arc<Mutex<Vec<Result<(), Option<Errno>>>>>;

/// Opens and accepts as the script says; an empty script accepts nothing, forever.
struct Scripted {
    opens: Mutex<Vec<Result<(), &'static str>>>,
    accepts: Accepts,
    served: AtomicUsize,
    panic_at: usize,
    /// How often nothing is there that a socket needs.
    unprepared: AtomicUsize,
    adopting: Adopting,
}
#[derive(Clone, Copy)]
enum Adopting {
    Refuses,
    Takes,
    Panics,
}
struct ScriptedSocket(Accepts, std::fs::File);

impl Socket for ScriptedSocket {
    type Connection = ();
    async fn accept(&self) -> io::Result<()> {
        let next = self.0.lock().unwrap().pop();
        match next {
            Some(Ok(())) => Ok(()),
            Some(Err(Some(errno))) => Err(errno.into()),
            Some(Err(None)) => Err(io::Error::other("unheard of")),
            None => std::future::pending().await,
        }
    }
    fn address(&self) -> String {
        "there".to_owned()
    }
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
    fn discard(self) {}
}

impl Service for Scripted {
    type Socket = ScriptedSocket;
    type Error = io::Error;
    fn address(&self) -> String {
        "wanted".to_owned()
    }
    fn name(&self) -> String {
        "wanted".to_owned()
    }
    async fn prepare(&self) -> io::Result<()> {
        let left = self.unprepared.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        if left.is_ok() { Err(io::Error::other("not prepared")) } else { Ok(()) }
    }
    fn adopt(&self, socket: OwnedFd, _: &str) -> Result<ScriptedSocket, Unusable> {
        match self.adopting {
            Adopting::Refuses => Err(Unusable::Silent),
            Adopting::Takes => Ok(ScriptedSocket(self.accepts.clone(), socket.into())),
            Adopting::Panics => panic!("on purpose"),
        }
    }
    async fn open(&self) -> io::Result<ScriptedSocket> {
        let next = self.opens.lock().unwrap().pop().unwrap_or(Ok(()));
        let file = std::fs::File::open("/dev/null")?;
        next.map_err(io::Error::other).map(|()| ScriptedSocket(self.accepts.clone(), file))
    }
    fn serve(self: &Arc<Self>, (): ()) {
        let served = self.served.fetch_add(1, Ordering::SeqCst) + 1;
        assert!(served != self.panic_at, "on purpose");
    }
}

fn scripted(opens: Vec<Result<(), &'static str>>, accepts: Vec<Result<(), Option<Errno>>>) -> Arc<Scripted> {
    let accepts = Arc::new(Mutex::new(accepts));
    Arc::new(Scripted {
        opens: Mutex::new(opens),
        accepts,
        served: AtomicUsize::new(0),
        panic_at: usize::MAX,
        unprepared: AtomicUsize::new(0),
        adopting: Adopting::Refuses,
    })
}

/// A service manager that kept a socket of the scripted service.
fn under_a_manager() -> (Arc<Shared>, UnixDatagram) {
    let (manager, heard) = Manager::heard_by(None);
    manager.take_in(vec![("wanted@1".to_owned(), std::fs::File::open("/dev/null").unwrap().into())]);
    let limits = Limits { retry: Duration::from_millis(10), ..Limits::default() };
    (Arc::new(Shared::under(manager, limits)), UnixDatagram::from_std(heard).unwrap())
}

/// The next that the service manager is told of what it keeps.
async fn said(heard: &UnixDatagram) -> String {
    let mut text = [0; 512];
    loop {
        let read = timeout(Duration::from_secs(10), heard.recv(&mut text)).await.unwrap().unwrap();
        if text.starts_with(b"FD") {
            return String::from_utf8_lossy(&text[..read]).into_owned();
        }
    }
}

const REMOVAL: &str = "FDSTOREREMOVE=1\nFDNAME=wanted@1\n";
const STORING: &str = "FDSTORE=1\nFDPOLL=0\nFDNAME=wanted\n";

#[tokio::test]
async fn a_socket_that_was_kept_waits_until_what_it_needs_is_there() {
    let (shared, heard) = under_a_manager();
    let mut service = scripted(Vec::new(), Vec::new());
    let script = Arc::get_mut(&mut service).unwrap();
    (script.unprepared, script.adopting) = (AtomicUsize::new(2), Adopting::Takes);
    let mut listening = Listening::start(service, shared.clone());
    listening.opening().settled().await;
    assert_eq!(listening.report().1.as_deref(), Some("not prepared"));
    // As the plane does when every listener had its chance.
    shared.manager.forget_rest().await;
    listening.status.wait_for(|status| matches!(status, Status::Open { .. })).await.unwrap();
    heard.try_recv(&mut [0; 512]).unwrap_err();
}

#[tokio::test]
async fn a_socket_that_waits_is_closed_with_its_listener() {
    let (shared, heard) = under_a_manager();
    let service = scripted(Vec::new(), Vec::new());
    service.unprepared.store(usize::MAX, Relaxed);
    let listening = Listening::start(service, shared.clone());
    listening.opening().settled().await;
    let (said, ()) = tokio::join!(said(&heard), listening.close());
    assert_eq!(said, REMOVAL);
}

#[tokio::test]
async fn a_socket_that_cannot_be_adopted_without_a_panic_is_replaced() {
    let (shared, heard) = under_a_manager();
    let mut service = scripted(Vec::new(), Vec::new());
    Arc::get_mut(&mut service).unwrap().adopting = Adopting::Panics;
    let _listening = Listening::start(service, shared.clone());
    assert_eq!(said(&heard).await, REMOVAL);
    assert_eq!(said(&heard).await, STORING);
    assert_eq!(shared.counters.panics.load(Relaxed), 1);
}

#[tokio::test]
async fn a_socket_that_could_not_be_stored_is_served_and_stored_later() {
    let (shared, heard) = under_a_manager();
    shared.manager.take("wanted").unwrap();
    shared.manager.fill();
    let service = scripted(Vec::new(), vec![Ok(())]);
    let _listening = Listening::start(service.clone(), shared.clone());
    until_served(&service, 1).await;
    assert_eq!(said(&heard).await, STORING);
}

async fn until_served(service: &Scripted, count: usize) {
    while service.served.load(Ordering::SeqCst) < count {
        sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_port_in_use_is_reported_and_taken_when_it_is_free() {
    let shared = Arc::new(Shared::new(Limits::default()));
    let mut changes = shared.counters.sequence();
    let service = scripted(vec![Ok(()), Err("in use"), Err("in use")], Vec::new());
    let listening = Listening::start(service, shared.clone());
    listening.opening().settled().await;
    assert_eq!(listening.report(), ("wanted".to_owned(), Some("in use".to_owned())));
    changes.changed().await.unwrap();
    let start = Instant::now();
    changes.changed().await.unwrap();
    assert_eq!(listening.report(), ("there".to_owned(), None));
    assert_eq!(start.elapsed().as_secs(), 2 * shared.limits.retry.as_secs());
    listening.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_is_asked_for_happens_at_once() {
    let shared = Arc::new(Shared::new(Limits::default()));
    let mut listening = Listening::start(scripted(vec![Ok(()), Err("in use")], Vec::new()), shared);
    listening.opening().settled().await;
    let start = Instant::now();
    listening.retry_now();
    listening.status.wait_for(|status| matches!(status, Status::Open { .. })).await.unwrap();
    assert_eq!((listening.report().1, start.elapsed()), (None, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn shortages_pause_accepting_and_errors_of_single_connections_do_not() {
    let shared = Arc::new(Shared::new(Limits::default()));
    let script = vec![Ok(()), Err(Some(Errno::MFILE)), Err(Some(Errno::NOMEM)), Ok(()), Err(Some(Errno::CONNABORTED))];
    let service = scripted(Vec::new(), script);
    let start = Instant::now();
    let listening = Listening::start(service.clone(), shared.clone());
    until_served(&service, 2).await;
    let waited = start.elapsed();
    assert!(waited >= 2 * SHORTAGE && waited < 3 * SHORTAGE, "{waited:?}");
    assert_eq!(shared.counters.accept_errors.load(Relaxed), 3);
    assert_eq!(listening.report().1, None);
}

#[tokio::test(start_paused = true)]
async fn errors_without_an_end_are_counted_and_pause_accepting_too() {
    let shared = Arc::new(Shared::new(Limits::default()));
    let persistent = [Err(Some(Errno::PERM)); IN_A_ROW as usize + 10];
    let service = scripted(Vec::new(), [&[Ok(())], persistent.as_slice(), &[Ok(())]].concat());
    let start = Instant::now();
    let listening = Listening::start(service.clone(), shared.clone());
    until_served(&service, 2).await;
    let waited = start.elapsed();
    assert!(waited >= 10 * SHORTAGE && waited < 11 * SHORTAGE, "{waited:?}");
    assert_eq!(shared.counters.accept_errors.load(Relaxed), u64::from(IN_A_ROW) + 10);
    assert_eq!(listening.report().1, None);
}

#[tokio::test(start_paused = true)]
async fn a_broken_socket_and_a_panic_lead_to_a_new_socket() {
    let shared = Arc::new(Shared::new(Limits::default()));
    let mut service = scripted(Vec::new(), vec![Ok(()), Err(Some(Errno::BADF)), Ok(()), Ok(()), Err(None)]);
    Arc::get_mut(&mut service).unwrap().panic_at = 1;
    let listening = Listening::start(service.clone(), shared.clone());
    until_served(&service, 3).await;
    assert_eq!(shared.counters.panics.load(Relaxed), 1);
    assert_eq!(listening.report().1, None);
}
