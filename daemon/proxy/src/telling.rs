//! What the service manager hears of this proxy while it runs: one line of status, and signs of life that prove that the
//! runtime still turns. READY and STOPPING are [`run`](crate::run_under)'s to say.

use crate::plane::Plane;
use crate::shared::Shared;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{MissedTickBehavior, interval, sleep};

/// Time between two status lines at least.
const PACE: Duration = Duration::from_secs(1);

/// Tells until dropped.
pub(crate) async fn tell(plane: &Plane, shared: &Shared) {
    if !shared.manager.is_there() {
        return std::future::pending().await;
    }
    tokio::join!(status(plane, shared), alive(plane, shared));
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

/// Signs of life: three in the time in which one must come, each after a look whether there is life.
async fn alive(plane: &Plane, shared: &Shared) {
    let Some(period) = shared.manager.watchdog() else { return std::future::pending().await };
    let mut rounds = interval(period / 3);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        plane.turns().await;
        match turns().await {
            Ok(()) => shared.manager.tell("WATCHDOG=1\n").await,
            Err(error) => tracing::error!(%error, "the runtime of the proxy does not turn"),
        }
    }
}

/// A byte over a socket between two tasks: workers run tasks, and the kernel's events arrive. (That timers fire, the caller's
/// rounds show.) When they don't, this does not return.
async fn turns() -> io::Result<()> {
    let (mut near, mut far) = UnixStream::pair()?;
    let answer = tokio::spawn(async move {
        let byte = far.read_u8().await?;
        far.write_u8(byte).await
    });
    near.write_u8(1).await?;
    near.read_u8().await?;
    answer.await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_runtime_that_turns_is_found_to() {
        turns().await.unwrap();
    }
}
