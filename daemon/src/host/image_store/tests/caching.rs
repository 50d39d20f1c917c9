//! The cache: what it holds, what is found in it, what is still what it was, and what goes.

use super::server::{Deed, Server, refuse};
use super::*;
use enclaved_core::id::EifDigest;
use enclaved_core::image::Pins;

/// The digest of no image.
const NOTHING: EifDigest = EifDigest([0; 32]);

fn s3() -> ImageRequest {
    request("s3://bucket/signer.eif")
}

fn stand(server: &Server) -> Stand {
    Stand::with_s3_at(&server.url(), NOWHERE)
}

fn other() -> Vec<u8> {
    sample("signer", 2, 4096).to_bytes()
}

fn pinned(request: ImageRequest, sha256: EifDigest) -> ImageRequest {
    ImageRequest { expected: Pins { sha256: Some(sha256), ..Pins::default() }.into(), ..request }
}

#[tokio::test]
async fn an_image_that_was_fetched_ahead_serves_a_request_with_other_pins_after_one_look() {
    let server = Server::of(image()).await;
    let stand = stand(&server);
    let first = stand.fetch(&s3()).await.unwrap();
    let before = server.asked().len();
    let pcr0 = Some(first.measurements().pcr0);
    let other_pins = ImageRequest { expected: Pins { pcr0, ..Pins::default() }.into(), ..s3() };
    assert_eq!(stand.fetch(&other_pins).await.unwrap(), first);
    assert_eq!(server.asked().len(), before + 1, "{:?}", server.asked());
    stand.fetch(&other_pins).await.unwrap();
    assert_eq!(server.asked().len(), before + 1, "from now on it is known");

    // What was fetched before the object was replaced is not what is there.
    server.put(other(), "\"two\"");
    let wrong = ImageRequest { expected: Pins { pcr1: Some(Pcr([1; 48])), ..Pins::default() }.into(), ..s3() };
    let failure = stand.fetch(&wrong).await.unwrap_err();
    assert!(
        failure.message.contains("is refused") && !failure.message.contains(&first.digest().to_string()),
        "{failure}"
    );
}

#[tokio::test]
async fn an_image_that_is_pinned_by_its_sha256_is_found_whatever_its_source() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let first = stand.fetch(&stand.request()).await.unwrap();
    let elsewhere = pinned(request("s3://nowhere-bucket/signer.eif"), first.digest());
    assert_eq!(stand.fetch(&elsewhere).await.unwrap(), first);
}

#[tokio::test]
async fn the_cache_says_what_it_holds_and_when_it_was_asked_for() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    assert_eq!(stand.store.observe().await.unwrap(), ImageCache::default());
    let began = std::time::SystemTime::now() - std::time::Duration::from_secs(1);
    let fetched = stand.fetch(&stand.request()).await.unwrap();
    let cache = stand.store.observe().await.unwrap();
    assert_eq!((cache.images.len(), cache.unfinished.len()), (1, 0));
    let cached = &cache.images[0];
    assert_eq!((cached.digest, cached.size), (fetched.digest(), image().len() as u64));
    assert!(cached.used >= began.into(), "{cached:?}");

    // Long ago, until it is asked for again.
    let entry = stand.store.cache.entry_path(&stand.request()).unwrap();
    let entry = File::options().append(true).open(entry).unwrap();
    entry.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(stand.store.observe().await.unwrap().images[0].used.as_millis(), 0);
    stand.fetch(&stand.request()).await.unwrap();
    assert!(stand.store.observe().await.unwrap().images[0].used >= began.into());
}

#[tokio::test]
async fn a_removed_image_is_gone_with_all_that_led_to_it_and_may_be_removed_twice() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let digest = stand.fetch(&stand.request()).await.unwrap().digest();
    stand.fetch(&pinned(stand.request(), digest)).await.unwrap();
    assert_eq!(stand.kept(), ["eif", "json", "json"]);
    for _ in 0..2 {
        stand.store.remove(&CacheItem::Image(digest)).await.unwrap();
        assert_eq!(stand.kept(), [""; 0]);
    }
}

#[tokio::test]
async fn an_unfinished_download_can_be_removed() {
    let server = Server::with(image(), |asked, _| match asked.is_part(65536) {
        true => refuse(403, "AccessDenied"),
        false => Deed::Serve,
    })
    .await;
    let mut stand = stand(&server);
    stand.store.part = 65536;
    stand.fetch(&s3()).await.unwrap_err();
    assert_eq!(stand.kept(), ["partial", "resume"]);
    for _ in 0..2 {
        stand.store.remove(&CacheItem::Unfinished(s3())).await.unwrap();
        assert_eq!(stand.kept(), [""; 0]);
    }
}

#[tokio::test]
async fn a_proof_holds_while_nobody_touches_the_file_and_is_made_anew_when_somebody_did() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let fetched = stand.fetch(&stand.request()).await.unwrap();
    let path = stand.store.path(&fetched.digest());
    assert_eq!(stand.store.prove(&fetched).await.unwrap(), Proof::Holds);

    // Another file with the same contents: it is hashed, and right.
    let proven = stand.store.cache.proof(&fetched.digest());
    fs::remove_file(&path).unwrap();
    fs::write(&path, image()).unwrap();
    assert_eq!(stand.store.prove(&fetched).await.unwrap(), Proof::Holds);
    assert_ne!(stand.store.cache.proof(&fetched.digest()), proven);

    // As after a restart: nothing was proven by that process.
    let again = Store::new(&stand.folder.path().join("images")).unwrap();
    assert_eq!(again.cache.proof(&fetched.digest()), None);
    assert_eq!(again.prove(&fetched).await.unwrap(), Proof::Holds);
    assert!(again.cache.proof(&fetched.digest()).is_some());
}

#[tokio::test]
async fn a_file_that_was_changed_is_found_though_its_size_and_date_are_as_before_and_is_fetched_again() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let fetched = stand.fetch(&stand.request()).await.unwrap();
    let path = stand.store.path(&fetched.digest());
    let date = fs::metadata(&path).unwrap().modified().unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let mut spoilt = image();
    *spoilt.last_mut().unwrap() ^= 1;
    let file = File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &spoilt, 0).unwrap();
    file.set_modified(date).unwrap();
    let Proof::Spoilt(failure) = stand.store.prove(&fetched).await.unwrap() else { panic!("it was changed") };
    assert!(failure.message.contains("is not the image any more"), "{failure}");
    assert!(!path.exists());
    assert_eq!(stand.fetch(&stand.request()).await.unwrap(), fetched);
    fs::remove_file(&path).unwrap();
    let Proof::Spoilt(failure) = stand.store.prove(&fetched).await.unwrap() else { panic!("it is gone") };
    assert!(failure.message.contains("is gone"), "{failure}");
}

#[tokio::test]
async fn a_source_is_watched_and_something_else_there_is_got() {
    let server = Server::of(image()).await;
    let stand = stand(&server);
    let refresh = async |known: &EifDigest| stand.store.refresh(&s3(), known, Arc::default()).await;
    let first = refresh(&NOTHING).await.unwrap().expect("there was nothing before");
    let before = server.asked().len();
    assert_eq!(refresh(&first.digest()).await.unwrap(), None);
    assert_eq!(server.asked().len(), before + 1, "one look");

    server.put(other(), "\"two\"");
    let second = refresh(&first.digest()).await.unwrap().expect("it is another");
    assert_ne!(second.digest(), first.digest());
    let again = refresh(&first.digest()).await.unwrap();
    assert_eq!(again.as_ref(), Some(&second), "whoever did not learn of it is told again");
    let refresh = async || refresh(&second.digest()).await;
    assert_eq!(refresh().await.unwrap(), None);
    assert_eq!(stand.fetch(&s3()).await.unwrap(), second);
    assert_eq!(stand.kept(), ["eif", "eif", "json"], "the first one stays until somebody removes it");

    // The same bytes, put there again.
    server.put(other(), "\"three\"");
    assert_eq!(refresh().await.unwrap(), None);
    let before = server.asked().len();
    assert_eq!(refresh().await.unwrap(), None);
    assert_eq!(server.asked().len(), before + 1, "it was noted");
}

#[tokio::test]
async fn what_is_refused_by_a_watch_changes_nothing_and_is_not_downloaded_again() {
    let server = Server::of(image()).await;
    let stand = stand(&server);
    let first = stand.fetch(&s3()).await.unwrap();
    let request = pinned(s3(), first.digest());
    stand.fetch(&request).await.unwrap();
    for (bytes, etag, reason) in [
        (other(), "\"two\"", "SHA-256 is"),
        (b"<html>".repeat(200), "\"three\"", "not an EIF"),
        (damage::bad_crc(image()), "\"four\"", "CRC"),
    ] {
        server.put(bytes, etag);
        let failure = stand.store.refresh(&request, &first.digest(), Arc::default()).await.unwrap_err();
        assert!(failure.message.contains(reason), "{failure}");
        let before = server.asked().len();
        assert_eq!(stand.store.refresh(&request, &first.digest(), Arc::default()).await.unwrap_err(), failure);
        assert_eq!(server.asked().len(), before + 1, "one look");
        assert_eq!(stand.fetch(&request).await.unwrap(), first);
        assert_eq!(stand.kept(), ["eif", "json", "json"]);
    }
    server.put(image(), "\"five\"");
    assert_eq!(stand.store.refresh(&request, &first.digest(), Arc::default()).await.unwrap(), None);
}

#[tokio::test]
async fn a_file_is_watched_too() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let first = stand.fetch(&stand.request()).await.unwrap().digest();
    let refresh = async |known| stand.store.refresh(&stand.request(), &known, Arc::default()).await;
    assert_eq!(refresh(first).await.unwrap(), None);
    let new = stand.folder.path().join("new");
    fs::write(&new, other()).unwrap();
    fs::rename(&new, stand.source()).unwrap();
    let second = refresh(first).await.unwrap().unwrap().digest();
    assert_eq!(refresh(second).await.unwrap(), None);
    fs::remove_file(stand.source()).unwrap();
    assert!(refresh(second).await.unwrap_err().message.contains("signer.eif"));
    assert!(stand.fetch(&stand.request()).await.is_ok());
}

#[tokio::test]
async fn a_source_that_says_nothing_of_its_contents_cannot_be_watched() {
    let server = Server::of(image()).await;
    server.change(|object| object.etag = None);
    let stand = stand(&server);
    let first = stand.fetch(&s3()).await.unwrap();
    let failure = stand.store.refresh(&s3(), &first.digest(), Arc::default()).await.unwrap_err();
    assert!(failure.message.contains("can't be watched"), "{failure}");
}

#[tokio::test]
async fn an_index_of_an_earlier_release_is_read() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let fetched = stand.fetch(&stand.request()).await.unwrap();
    let entry = stand.store.cache.entry_path(&stand.request()).unwrap();
    let old = serde_json::json!({ "request": stand.request(), "digest": fetched.digest() });
    fs::write(entry, old.to_string()).unwrap();
    fs::remove_file(stand.source()).unwrap();
    assert_eq!(stand.fetch(&stand.request()).await.unwrap(), fetched);
}

#[tokio::test]
async fn a_cached_image_that_is_replaced_or_touched_while_it_is_measured_is_measured_again_and_stays() {
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let digest = stand.fetch(&stand.request()).await.unwrap().digest();
    let path = stand.store.path(&digest);
    let replace = || {
        let incoming = stand.folder.path().join("incoming");
        fs::write(&incoming, image()).unwrap();
        fs::rename(incoming, &path).unwrap();
    };
    let link = || fs::hard_link(&path, stand.folder.path().join("backup")).unwrap();
    for touch in [&replace as &dyn Fn(), &link] {
        let kept = stand.store.open_kept(&digest).unwrap().unwrap();
        let result = measure_whole(kept.file.try_clone().unwrap(), &Arc::default()).await;
        touch();
        assert!(stand.store.judge(&digest, &kept, result).unwrap().is_none());
        assert_eq!(fs::read(&path).unwrap(), image());
        assert!(matches!(stand.store.measured(&digest, &Arc::default()).await.unwrap(), Found::Image(_)));
    }

    // One that is something else goes, but not the right one that was put in its place meanwhile.
    fs::remove_file(&path).unwrap();
    fs::write(&path, other()).unwrap();
    let kept = stand.store.open_kept(&digest).unwrap().unwrap();
    let result = measure_whole(kept.file.try_clone().unwrap(), &Arc::default()).await;
    replace();
    assert!(stand.store.judge(&digest, &kept, result).unwrap().is_none());
    assert_eq!(fs::read(&path).unwrap(), image());
}

#[tokio::test]
async fn an_image_that_is_kept_and_proven_is_not_replaced_by_the_same_one() {
    use std::os::unix::fs::MetadataExt;
    let stand = Stand::new();
    fs::write(stand.source(), image()).unwrap();
    let digest = stand.fetch(&stand.request()).await.unwrap().digest();
    let inode = || fs::metadata(stand.store.path(&digest)).unwrap().ino();
    let before = inode();
    let copy = || {
        let incoming = stand.store.cache.incoming().unwrap();
        fs::write(incoming.path(), image()).unwrap();
        let measured = FileStamp::of(&incoming.file().metadata().unwrap());
        stand.store.cache.keep(incoming, &measured, &digest).unwrap();
    };
    copy();
    assert_eq!(inode(), before);
    assert_eq!(stand.kept(), ["eif", "json"]);
    // Somebody has touched it, so that it may be anything.
    fs::set_permissions(stand.store.path(&digest), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    copy();
    assert_ne!(inode(), before);
    assert_eq!(stand.kept(), ["eif", "json"]);
}
