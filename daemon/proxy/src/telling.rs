//! What the service manager hears of this proxy while it runs: one line of status, and signs of life that prove that the
//! runtime still turns. READY and STOPPING are [`run`](crate::run_under)'s to say.

use crate::plane::Plane;
use crate::shared::Shared;
use crate::throttle::Throttle;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

/// Time between two status lines at least.
const PACE: Duration = Duration::from_secs(1);

/// Makes both ends of a socket.
type Pair = fn() -> io::Result<(UnixStream, UnixStream)>;

/// Tells until dropped.
pub(crate) async fn tell(plane: &Plane, shared: &Shared) {
    if !shared.manager.is_there() {
        return std::future::pending().await;
    }
    tokio::join!(status(plane, shared), alive(shared, UnixStream::pair));
}

async fn status(plane: &Plane, shared: &Shared) {
    let mut changes = shared.counters.sequence();
    let mut told = String::new();
    loop {
        changes.mark_unchanged();
        let line = line(plane).await;
        if line != told {
            shared.manager.tell(&format!("STATUS={line}\n")).await;
            told = line;
        }
        sleep(PACE).await;
        if changes.changed().await.is_err() {
            return;
        }
    }
}

async fn line(plane: &Plane) -> String {
    let (listeners, closed) = plane.listening().await;
    match (listeners, closed.first()) {
        (0, _) => "no routes, nothing to serve".to_owned(),
        (_, None) => format!("{listeners} of {listeners} listeners open"),
        (_, Some(first)) => {
            format!("{} of {listeners} listeners open; not open: {first}", listeners - closed.len())
        }
    }
}

/// Signs of life: three in the time in which one must come, each after a look whether there is life. Only a look that does
/// not end is death: one that cannot be taken, for want of descriptors, says nothing. No lock is looked at, as one may be held
/// while a disk hangs, which is no reason to cut every connection.
async fn alive(shared: &Shared, pair: Pair) {
    let Some(period) = shared.manager.watchdog() else { return std::future::pending().await };
    let mut rounds = interval(period / 3);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut pulse, trouble) = (Pulse::new(pair).ok(), Throttle::new());
    loop {
        rounds.tick().await;
        if let Err(error) = turn(&mut pulse, pair).await
            && let Some(left_out) = trouble.pass()
        {
            tracing::warn!(%error, left_out, "could not look whether the runtime of the proxy turns; taking it that it does");
        }
        shared.manager.tell("WATCHDOG=1\n").await;
    }
}

/// One look. What it is taken with is made anew should it be of no use.
async fn turn(pulse: &mut Option<Pulse>, pair: Pair) -> io::Result<()> {
    let mut taken = match pulse.take() {
        Some(pulse) => pulse,
        None => Pulse::new(pair)?,
    };
    taken.beat().await?;
    *pulse = Some(taken);
    Ok(())
}

/// A byte over a socket between two tasks: workers run tasks, and the kernel's events arrive. (That timers fire, the caller's
/// rounds show.) Made once, so that a look needs no descriptor.
struct Pulse {
    near: UnixStream,
    /// Ends with this.
    _echo: JoinSet<()>,
}

impl Pulse {
    fn new(pair: Pair) -> io::Result<Self> {
        let (near, far) = pair()?;
        let mut echo = JoinSet::new();
        echo.spawn(async move {
            // Its end is seen by the near end.
            drop(answer(far).await);
        });
        Ok(Self { near, _echo: echo })
    }

    /// When the runtime does not turn, this does not return.
    async fn beat(&mut self) -> io::Result<()> {
        self.near.write_u8(1).await?;
        self.near.read_u8().await.map(drop)
    }
}

async fn answer(mut far: UnixStream) -> io::Result<()> {
    loop {
        let byte = far.read_u8().await?;
        far.write_u8(byte).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificates::internal_ca::InternalCa;
    use crate::ingress::{https::Https, tls, upstream::Upstreams};
    use crate::limits::Limits;
    use crate::manager::Manager;
    use crate::store::Store;
    use crate::vsock::Transport;
    use rustix::io::Errno;
    use std::sync::Arc;
    use tokio::net::UnixDatagram;
    use tokio::time::timeout;

    const PERIOD: Duration = Duration::from_millis(30);
    const DEADLINE: Duration = Duration::from_secs(10);

    fn watched() -> (Arc<Shared>, UnixDatagram) {
        let (manager, heard) = Manager::heard_by(Some(PERIOD));
        (Arc::new(Shared::under(manager, Limits::default())), UnixDatagram::from_std(heard).unwrap())
    }

    async fn sign_of_life(heard: &UnixDatagram) {
        let mut text = [0; 512];
        while !text.starts_with(b"WATCHDOG=1\n") {
            timeout(DEADLINE, heard.recv(&mut text)).await.expect("no sign of life").unwrap();
        }
    }

    #[tokio::test]
    async fn a_runtime_that_turns_is_found_to_by_one_socket_again_and_again() {
        let mut pulse = Some(Pulse::new(UnixStream::pair).unwrap());
        for _ in 0..3 {
            turn(&mut pulse, || Err(Errno::MFILE.into())).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_proxy_without_descriptors_is_alive() {
        let (shared, heard) = watched();
        tokio::select! {
            () = alive(&shared, || Err(Errno::MFILE.into())) => unreachable!("it tells until dropped"),
            () = async { for _ in 0..3 { sign_of_life(&heard).await } } => {}
        }
    }

    #[tokio::test]
    async fn a_proxy_whose_disk_hangs_is_alive() {
        let (shared, heard) = watched();
        let folder = tempfile::tempdir().unwrap();
        let provider = tls::provider();
        let certificates = Arc::new(InternalCa::new(folder.path().join("ca"), provider.clone()));
        let upstreams = Arc::new(Upstreams::new(shared.clone(), Transport::AfVsock));
        let https = Https::new(shared.clone(), provider, certificates, upstreams).unwrap();
        let plane = Plane::new(shared.clone(), Arc::new(https), Store::new(folder.path().join("routes.json")));
        let _held = plane.hold().await;
        tokio::select! {
            () = tell(&plane, &shared) => unreachable!("it tells until dropped"),
            () = async { for _ in 0..3 { sign_of_life(&heard).await } } => {}
        }
    }
}
