//! A crash after every single operation on the disk. The process ends there; of what was not flushed, everything, the data or
//! all of it is lost. Whatever is left, the next life serves no image that is not whole, fetches what it needs, and leaves
//! nothing behind for good.

use super::server::{Deed, Server, refuse};
use super::*;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::fs::{FileExt, MetadataExt};

/// What a crash leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    /// The process ended, the machine did not: everything.
    Everything,
    /// All names, but of the contents what was flushed.
    Names,
    /// What was flushed.
    Flushed,
}

/// Sees every operation, lets those after the `last` fail, and knows what would survive a power cut.
pub(in super::super) struct Watch {
    seen: Mutex<Seen>,
    last: u32,
    /// Is told the kind of each operation that is about to be done, and lets it fail or not.
    intervene: Box<Intervene>,
}

type Intervene = dyn Fn(&str) -> io::Result<()> + Send + Sync;

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("seen", &self.seen).field("last", &self.last).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Seen {
    operations: u32,
    /// By inode, as flushed.
    contents: BTreeMap<u64, Vec<u8>>,
    names: BTreeMap<OsString, u64>,
    flushed_names: BTreeMap<OsString, u64>,
}

fn name(path: &Path) -> OsString {
    path.file_name().unwrap().to_owned()
}

impl Watch {
    fn until(last: u32) -> Arc<Self> {
        Arc::new(Self { seen: Mutex::default(), last, intervene: Box::new(|_| Ok(())) })
    }

    /// One that has no crash, but lets single operations fail: it is told their kind (`created`, `changed`, `synced`, ...)
    /// before they are done.
    pub(super) fn intervening(intervene: impl Fn(&str) -> io::Result<()> + Send + Sync + 'static) -> Disk {
        let watch = Self { seen: Mutex::default(), last: u32::MAX, intervene: Box::new(intervene) };
        Disk { watched: Some(Arc::new(watch)) }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    pub(in super::super) fn before(&self, kind: &str) -> io::Result<()> {
        (self.intervene)(kind)?;
        let mut seen = self.seen();
        seen.operations += 1;
        if seen.operations > self.last { Err(io::Error::other("crashed")) } else { Ok(()) }
    }

    pub(in super::super) fn created(&self, file: &File, path: &Path) {
        let inode = file.metadata().unwrap().ino();
        let mut seen = self.seen();
        // An inode that was in use before is a new file.
        seen.contents.insert(inode, Vec::new());
        seen.names.insert(name(path), inode);
    }

    #[expect(clippy::unused_self, reason = "it is told, and has nothing to note")]
    pub(in super::super) fn changed(&self, (): &()) {}

    pub(in super::super) fn synced(&self, (): &(), file: &File) {
        let found = file.metadata().unwrap();
        let mut contents = vec![0; usize::try_from(found.len()).unwrap()];
        file.read_exact_at(&mut contents, 0).unwrap();
        self.seen().contents.insert(found.ino(), contents);
    }

    pub(in super::super) fn renamed(&self, (): &(), from: &Path, to: &Path) {
        let mut seen = self.seen();
        if let Some(inode) = seen.names.remove(&name(from)) {
            seen.names.insert(name(to), inode);
        }
    }

    pub(in super::super) fn removed(&self, (): &(), path: &Path) {
        self.seen().names.remove(&name(path));
    }

    pub(in super::super) fn folder_synced(&self, (): &()) {
        let mut seen = self.seen();
        seen.flushed_names = seen.names.clone();
    }

    /// The folder as it is after the crash, in another place.
    fn leave(&self, from: &Path, to: &Path, left: Left) {
        fs::create_dir(to).unwrap();
        let seen = self.seen();
        let names = if left == Left::Flushed { &seen.flushed_names } else { &seen.names };
        if left == Left::Everything {
            for entry in fs::read_dir(from).unwrap() {
                let entry = entry.unwrap();
                fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
            }
            return;
        }
        for (name, inode) in names {
            fs::write(to.join(name), &seen.contents[inode]).unwrap();
        }
    }
}

fn remote(server: &Server) -> ImageRequest {
    request(&format!("{}/signer.eif", server.url()))
}

fn small() -> Vec<u8> {
    sample("signer", 1, 40_000).to_bytes()
}

fn next_one() -> Vec<u8> {
    sample("signer", 2, 40_000).to_bytes()
}

async fn server() -> Server {
    // A part that is refused once: so there is a download that is continued, too.
    Server::with(small(), |asked, before| match asked.is_part(16_384) && before == 0 {
        true => refuse(403, "AccessDenied"),
        false => Deed::Serve,
    })
    .await
}

/// A life of the process: everything that the store does to its disk. It goes on whatever fails.
async fn live(stand: &Stand, server: &Server) -> Vec<VerifiedImage> {
    let mut served = Vec::new();
    served.extend(stand.fetch(&remote(server)).await);
    served.extend(stand.fetch(&remote(server)).await);
    served.extend(stand.fetch(&stand.request()).await);
    server.put(next_one(), "\"two\"");
    let known = served.first().map_or(EifDigest([0; 32]), VerifiedImage::digest);
    served.extend(stand.store.refresh(&remote(server), &known, Arc::default()).await.ok().flatten());
    if let Some(first) = served.first() {
        drop(stand.store.remove(&CacheItem::Image(first.digest())).await);
    }
    served
}

/// Another life of the process, on that folder. (The clients are those of the first life: making them takes longer than all
/// else here.)
fn begin_life(stand: &mut Stand, images: &str, watch: Arc<Watch>) {
    let folder = stand.folder.path().join(images);
    stand.store.cache = Arc::new(Cache::open(&folder, Disk { watched: Some(watch) }).unwrap());
    stand.store.refused = Mutex::default();
    stand.store.part = 8192;
}

/// What must hold in the life after.
async fn check(stand: &mut Stand, images: &str, server: &Server, what: &str) {
    begin_life(stand, images, Watch::until(u32::MAX));
    // Everything that looks like an image is one.
    let cache = stand.store.observe().await.unwrap();
    for cached in &cache.images {
        let bytes = fs::read(stand.store.path(&cached.digest)).unwrap();
        assert!([small(), next_one(), image()].contains(&bytes), "{what}: {} is no image of ours", cached.digest);
    }
    // The server refuses a part once; if it has not yet, it does now.
    let served = match stand.fetch(&remote(server)).await {
        Ok(image) => image,
        Err(_) => stand.fetch(&remote(server)).await.unwrap_or_else(|failure| panic!("{what}: {failure}")),
    };
    let bytes = fs::read(stand.store.path(&served.digest())).unwrap();
    assert!([small(), next_one()].contains(&bytes), "{what}");
    // Whatever is left is known, and goes when the planner says so.
    let cache = stand.store.observe().await.unwrap();
    for unfinished in cache.unfinished {
        stand.store.remove(&CacheItem::Unfinished(unfinished.request)).await.unwrap();
    }
    for cached in cache.images {
        stand.store.remove(&CacheItem::Image(cached.digest)).await.unwrap();
    }
    let left: BTreeSet<_> =
        fs::read_dir(stand.folder.path().join(images)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, BTreeSet::new(), "{what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_after_any_operation_on_the_disk_costs_no_more_than_a_download() {
    let mut stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let whole = {
        let server = server().await;
        let watch = Watch::until(u32::MAX);
        begin_life(&mut stand, "whole", Arc::clone(&watch));
        assert_eq!(live(&stand, &server).await.len(), 3, "without a crash everything is served");
        let seen = watch.seen();
        seen.operations
    };
    assert!(whole > 40, "{whole}");
    // Parts and the writing down of them race, so that some lives have a few operations more.
    for last in 0..whole + 2 {
        let server = server().await;
        let watch = Watch::until(last);
        begin_life(&mut stand, "crashing", Arc::clone(&watch));
        live(&stand, &server).await;
        for left in [Left::Everything, Left::Names, Left::Flushed] {
            let after = stand.folder.path().join("after");
            watch.leave(&stand.folder.path().join("crashing"), &after, left);
            let what = format!("crash after operation {last} of {whole}, leaving {left:?}");
            check(&mut stand, "after", &server, &what).await;
            fs::remove_dir(after).unwrap();
        }
        fs::remove_dir_all(stand.folder.path().join("crashing")).unwrap();
    }
}
