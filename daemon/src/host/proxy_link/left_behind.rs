//! A proxy that a daemon with `supervisor = "direct"` has left running, on a host where systemd supervises now: it goes on serving the
//! routes it was handed last, and holds their ports, so `enclaved-proxy.service` can't have them. It is looked for and told of.
//!
//! It is not ended from here: its connections would end with it, when is an operator's to choose, and it may be another user's.

use super::ask;
use crate::atomic_file;
use enclaved_core::failure::Failure;
use enclaved_core::inventory::parse::listens_at;
use enclaved_core::routes::LinkRequest;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// How often is looked.
const PAUSE: Duration = Duration::from_secs(5);
/// How long it may take to answer; that somebody listens counts without an answer, too.
const PATIENCE: Duration = Duration::from_secs(2);
/// The kernel's list of Unix sockets.
const SOCKETS: &str = "/proc/net/unix";
const MAX_SOCKETS: u64 = 64 << 20;

/// Looks for one at that socket until `stop`, and tells of every change.
pub async fn watch(socket: PathBuf, tell: impl Fn(Option<Failure>) + Send, stop: CancellationToken) {
    let mut told = None;
    loop {
        let seen = look(&socket, Path::new(SOCKETS)).await;
        if seen != told {
            match &seen {
                Some(failure) => tracing::warn!("{failure}"),
                None => tracing::info!("no proxy of supervisor = \"direct\" runs any more"),
            }
            tell(seen.clone());
            told = seen;
        }
        tokio::select! {
            // Both are plain waits.
            () = sleep(PAUSE) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// What is to be told of a process that listens there; `None`: none does, or none is seen.
async fn look(socket: &Path, sockets: &Path) -> Option<Failure> {
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        // There is nothing, or what a process has left behind that is gone.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return None;
        }
        // Another user's. The kernel tells whether anybody listens, and not who.
        Err(_) => {
            let list = atomic_file::read(sockets, MAX_SOCKETS).ok().flatten()?;
            let listens = listens_at(&String::from_utf8_lossy(&list), &socket.to_string_lossy());
            let find = format!("end the process that `ss -xlp src {}` names to root", socket.display());
            return listens.then(|| failure("a process", socket, "", &find));
        }
    };
    let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
    drop(stream);
    let routes = match ask(socket, &LinkRequest::Report, PATIENCE).await {
        Ok(report) => report.revision.map_or_else(String::new, |of| format!(" (its routes are {of})")),
        Err(_) => " (it does not answer)".to_owned(),
    };
    let (who, end) = match pid {
        Some(pid) => (format!("process {pid}"), format!("`kill {pid}` ends it")),
        None => ("a process".to_owned(), format!("end the process that `ss -xlp src {}` names", socket.display())),
    };
    Some(failure(&who, socket, &routes, &end))
}

fn failure(who: &str, socket: &Path, routes: &str, end: &str) -> Failure {
    Failure::new(format!(
        "{who} serves at {}, where supervisor = \"direct\" has its proxy{routes}: while it runs, it holds the ports of its routes, and \
         enclaved-proxy.service can't have them",
        socket.display()
    ))
    .with_remedy(format!(
        "{end}, and its connections within 5 s; enclaved-proxy.service takes over by itself, if all below its folder is its own: \
         `chown -R enclaved-proxy: /var/lib/enclaved-proxy`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn nothing_is_told_where_nobody_listens() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("proxy.sock");
        assert_eq!(look(&socket, Path::new(SOCKETS)).await, None);
        drop(UnixListener::bind(&socket).unwrap());
        assert!(socket.exists());
        assert_eq!(look(&socket, Path::new(SOCKETS)).await, None, "its process is gone");
    }

    #[tokio::test]
    async fn whoever_listens_is_told_with_its_process_though_it_does_not_answer() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("proxy.sock");
        let _listener = UnixListener::bind(&socket).unwrap();
        let failure = look(&socket, Path::new(SOCKETS)).await.unwrap();
        let pid = std::process::id();
        assert!(failure.message.starts_with(&format!("process {pid} serves at ")), "{failure}");
        assert!(failure.message.contains("(it does not answer)"), "{failure}");
        assert!(failure.remedy.unwrap().starts_with(&format!("`kill {pid}` ends it, and its connections")));
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_told_when_it_is_seen_first_and_when_it_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("proxy.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let watching = tokio::spawn(watch(socket, move |seen| sender.send(seen.is_some()).unwrap(), stop.clone()));
        assert_eq!(told.recv().await, Some(true));
        drop(listener);
        assert_eq!(told.recv().await, Some(false));
        stop.cancel();
        watching.await.unwrap();
        assert_eq!(told.recv().await, None);
    }
}
