//! Downloads from an S3 that does what a test wants: parts, retries, what goes on and what begins anew.

use super::crash::Watch;
use super::server::{Asked, Deed, Server, refuse};
use super::*;
use aws_smithy_types::base64;
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// So small that an image has ten parts or so.
const PART: u64 = 64 << 10;

fn stand(server: &Server) -> Stand {
    stand_at(&server.url())
}

fn stand_at(url: &str) -> Stand {
    let mut stand = Stand::with_s3_at(url, NOWHERE);
    stand.store.part = PART;
    stand
}

fn large() -> Vec<u8> {
    sample("signer", 1, 600_000).to_bytes()
}

fn other() -> Vec<u8> {
    let mut other = sample("signer", 2, 600_000).to_bytes();
    assert_eq!(other.len(), large().len());
    assert_ne!(other, large());
    other.shrink_to_fit();
    other
}

fn every_part() -> Vec<u64> {
    (0..(large().len() as u64).div_ceil(PART)).map(|part| part * PART).collect()
}

fn s3() -> ImageRequest {
    request("s3://bucket/signer.eif")
}

fn contents(stand: &Stand, image: &VerifiedImage) -> Vec<u8> {
    fs::read(stand.store.path(&image.digest())).unwrap()
}

/// As after a restart of the process.
fn again(stand: Stand, server: &Server) -> Stand {
    let mut next = self::stand(server);
    next.store.cache = Arc::new(Cache::open(&stand.folder.path().join("images"), Disk::default()).unwrap());
    next.folder = stand.folder;
    next
}

#[tokio::test]
async fn an_object_is_got_in_parts_each_once_and_each_of_the_object_that_was_seen_first() {
    let server = Server::of(large()).await;
    let stand = stand(&server);
    let progress = Arc::new(Progress::default());
    let image = stand.store.fetch(&s3(), Prefer::Cached, progress.clone()).await.unwrap();
    assert_eq!(contents(&stand, &image), large());
    assert_eq!(server.parts(), every_part());
    let gets: Vec<Asked> = server.asked().into_iter().filter(|asked| asked.method == "GET").collect();
    assert!(gets.iter().all(|asked| asked.if_match.as_deref() == Some("\"one\"")), "{gets:?}");
    let size = large().len() as u64;
    assert_eq!((progress.get(), progress.stage()), ((size, size), FetchStage::Measuring));
    assert_eq!(stand.kept(), ["eif", "json"]);
}

#[tokio::test]
async fn a_part_that_breaks_off_goes_on_where_it_broke_and_the_others_are_not_touched() {
    let server = Server::with(large(), |asked, before| match asked.is_part(2 * PART) && before == 0 {
        true => Deed::BreakOff(10_000),
        false => Deed::Serve,
    })
    .await;
    let stand = stand(&server);
    let progress = Arc::new(Progress::default());
    let image = stand.store.fetch(&s3(), Prefer::Cached, progress.clone()).await.unwrap();
    assert_eq!(contents(&stand, &image), large());
    let parts = server.parts();
    assert_eq!(parts.len(), every_part().len() + 1, "{parts:?}");
    // What came of it may be a little less than what was sent.
    assert!(parts.iter().any(|begin| (2 * PART..=2 * PART + 10_000).contains(begin) && *begin % PART <= 10_000));
    let size = large().len() as u64;
    assert_eq!(progress.get(), (size, size), "no byte is counted twice");
}

#[tokio::test]
async fn an_overloaded_s3_is_asked_again_for_the_part_alone() {
    let server = Server::with(large(), |asked, before| match asked.is_part(PART) && before < 2 {
        true => refuse(503, "SlowDown"),
        false => Deed::Serve,
    })
    .await;
    let stand = stand(&server);
    stand.fetch(&s3()).await.unwrap();
    assert_eq!(server.parts().len(), every_part().len() + 2);
}

#[tokio::test]
async fn a_refusal_midway_is_final_names_who_and_how_far_and_what_came_is_not_fetched_again() {
    // A seventh part is asked for only when one of the six at a time has come whole.
    let server = Server::with(large(), |asked, before| match asked.is_part(6 * PART) && before == 0 {
        true => refuse(403, "AccessDenied"),
        false => Deed::Serve,
    })
    .await;
    let stand = stand(&server);
    let failure = stand.fetch(&s3()).await.unwrap_err();
    for part in ["s3://bucket/signer.eif", "403 AccessDenied", "the access key AKIATEST", "region eu-central-1"] {
        assert!(failure.message.contains(part), "{failure}");
    }
    assert!(failure.remedy.as_ref().unwrap().contains("s3:GetObject on arn:aws:s3:::bucket/signer.eif"), "{failure}");
    assert_eq!(stand.kept(), ["partial", "resume"]);
    let cache = stand.store.observe().await.unwrap();
    assert_eq!((cache.images.len(), cache.unfinished.len()), (0, 1));
    assert!(cache.unfinished[0].request == s3() && cache.unfinished[0].size > 0, "{cache:?}");

    let before = server.parts();
    let image = stand.fetch(&s3()).await.unwrap();
    assert_eq!(contents(&stand, &image), large());
    let all = server.parts();
    // Parts that were being got when it ended may be asked for twice, those that were finished are not.
    assert!(all.len() - before.len() < every_part().len(), "{before:?} then {all:?}");
}

#[tokio::test]
async fn a_restarted_process_goes_on_with_what_is_on_disk_and_hashes_it_again() {
    for spoil in [false, true] {
        let server = Server::with(large(), |asked, before| match asked.is_part(6 * PART) && before == 0 {
            true => refuse(403, "AccessDenied"),
            false => Deed::Serve,
        })
        .await;
        let stand = stand(&server);
        stand.fetch(&s3()).await.unwrap_err();
        let sidecar = stand.store.cache.resume_path(&s3()).unwrap();
        let resume = sidecar::Resume::read(&sidecar).unwrap().unwrap();
        let finished = resume.parts().unwrap();
        assert!(finished.done() > 0 && finished.front() > 0, "{finished:?}");
        if spoil {
            let path = stand.folder.path().join("images").join(&resume.file);
            let mut data = fs::read(&path).unwrap();
            data[40_000] ^= 1;
            fs::write(path, data).unwrap();
        }
        let before = server.parts().len();
        let stand = again(stand, &server);
        let progress = Arc::new(Progress::default());
        let image = stand.store.fetch(&s3(), Prefer::Cached, progress.clone()).await.unwrap();
        assert_eq!(contents(&stand, &image), large());
        let there: u64 = finished.finished().iter().map(|(first, end)| end - first).sum();
        let missing = every_part().len() as u64 - there;
        let asked = (server.parts().len() - before) as u64;
        let expected = if spoil { missing + every_part().len() as u64 } else { missing };
        assert_eq!(asked, expected, "spoilt: {spoil}");
        assert_eq!(progress.get().0, large().len() as u64);
        assert_eq!(stand.kept(), ["eif", "json"]);
    }
}

#[tokio::test]
async fn an_object_that_is_replaced_midway_is_got_anew_and_never_mixed() {
    let server = Arc::new(Mutex::new(None::<Arc<Server>>));
    let of_deed = Arc::clone(&server);
    let first = Server::with(large(), move |asked, before| {
        if asked.is_part(4 * PART)
            && before == 0
            && let Some(server) = &*of_deed.lock().unwrap()
        {
            server.put(other(), "\"two\"");
        }
        Deed::Serve
    })
    .await;
    let first = Arc::new(first);
    *server.lock().unwrap() = Some(Arc::clone(&first));
    let stand = stand(&first);
    let image = stand.fetch(&s3()).await.unwrap();
    assert_eq!(contents(&stand, &image), other());
    assert_eq!(stand.kept(), ["eif", "json"]);
    *server.lock().unwrap() = None;
}

#[tokio::test]
async fn what_an_earlier_life_had_of_another_object_is_not_used() {
    let server = Server::with(large(), |asked, before| match asked.is_part(6 * PART) && before == 0 {
        true => refuse(403, "AccessDenied"),
        false => Deed::Serve,
    })
    .await;
    let stand = stand(&server);
    stand.fetch(&s3()).await.unwrap_err();
    server.put(other(), "\"two\"");
    let stand = again(stand, &server);
    let image = stand.fetch(&s3()).await.unwrap();
    assert_eq!(contents(&stand, &image), other());
    assert_eq!(stand.kept(), ["eif", "json"]);
}

#[tokio::test]
async fn an_object_that_is_replaced_all_the_time_is_given_up() {
    let server = Server::with(large(), |asked, _| match asked.is_part(PART) {
        true => refuse(412, "PreconditionFailed"),
        false => Deed::Serve,
    })
    .await;
    let stand = stand(&server);
    let failure = stand.fetch(&s3()).await.unwrap_err();
    assert!(failure.message.contains("replaced while it was being fetched"), "{failure}");
    assert_eq!(server.asked().iter().filter(|asked| asked.is_part(PART)).count(), 4);
    assert_eq!(stand.kept(), [""; 0]);
}

#[tokio::test]
async fn a_server_without_ranges_or_without_etags_is_read_in_one_piece() {
    let server = Server::with(large(), |_, _| Deed::Whole).await;
    let image = stand(&server).fetch(&s3()).await.unwrap();
    assert_eq!(image.size(), large().len() as u64);

    let server = Server::of(large()).await;
    server.change(|object| object.etag = None);
    let stand = stand(&server);
    let image = stand.fetch(&s3()).await.unwrap();
    assert_eq!(contents(&stand, &image), large());
    assert_eq!(server.parts(), [0; 0]);
}

#[tokio::test]
async fn what_is_read_in_one_piece_and_breaks_off_is_begun_again() {
    let server = Server::with(large(), |asked, before| match (asked.method.as_str(), before) {
        ("GET", 0 | 1) => Deed::BreakOff(100_000),
        _ => Deed::Serve,
    })
    .await;
    server.change(|object| object.etag = None);
    let stand = stand(&server);
    let progress = Arc::new(Progress::default());
    let image = stand.store.fetch(&s3(), Prefer::Cached, progress.clone()).await.unwrap();
    assert_eq!(contents(&stand, &image), large());
    assert_eq!(progress.get().0, large().len() as u64);
    assert_eq!(stand.kept(), ["eif", "json"]);
}

#[tokio::test]
async fn expired_credentials_are_asked_for_anew_midway() {
    use aws_credential_types::provider::{ProvideCredentials, future};

    /// Hands out a new key each time it is asked.
    #[derive(Debug, Default)]
    struct Keys(AtomicU32);
    impl ProvideCredentials for Keys {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            let key = format!("AKIA{}", self.0.fetch_add(1, Relaxed));
            future::ProvideCredentials::ready(Ok(Credentials::new(key, "secret", None, None, "test")))
        }
    }

    // The first key is asked for to name the caller, the second is the SDK's own.
    let server =
        Server::with(large(), |asked, _| match asked.is_part(5 * PART) && asked.authorization.contains("AKIA1/") {
            true => refuse(400, "ExpiredToken"),
            false => Deed::Serve,
        })
        .await;
    let mut stand = stand(&server);
    let config = SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("eu-central-1"))
        .endpoint_url(server.url())
        .credentials_provider(SharedCredentialsProvider::new(Keys::default()))
        .build();
    stand.store.s3 = S3::with(&config, crate::imds::Imds::at(NOWHERE).unwrap());
    stand.fetch(&s3()).await.unwrap();
    let part: Vec<Asked> = server.asked().into_iter().filter(|asked| asked.is_part(5 * PART)).collect();
    assert!(part.len() == 2 && part[1].authorization.contains("AKIA2/"), "{part:?}");
}

#[tokio::test]
async fn a_bucket_in_another_region_is_asked_there() {
    let server = Server::with(large(), |asked, _| match asked.authorization.contains("/us-west-2/") {
        true => Deed::Serve,
        false => Deed::Refuse(301, "PermanentRedirect", vec![("x-amz-bucket-region", "us-west-2".to_owned())]),
    })
    .await;
    let stand = stand(&server);
    stand.fetch(&s3()).await.unwrap();
    let there = |asked: &Asked| asked.authorization.contains("/us-west-2/");
    assert_eq!(server.asked().iter().filter(|asked| !there(asked)).count(), 1);
    stand.fetch(&request("s3://bucket/other.eif")).await.unwrap();
    assert_eq!(server.asked().iter().filter(|asked| !there(asked)).count(), 1, "it is remembered");
}

#[tokio::test]
async fn a_region_that_leads_nowhere_is_told() {
    let server = Server::with(large(), |_, _| {
        Deed::Refuse(301, "PermanentRedirect", vec![("x-amz-bucket-region", "us-west-2".to_owned())])
    })
    .await;
    let failure = stand(&server).fetch(&s3()).await.unwrap_err();
    assert!(failure.message.contains("301 PermanentRedirect") && failure.message.contains("us-west-2"), "{failure}");
}

#[tokio::test]
async fn a_version_of_an_object_is_asked_for_by_its_id() {
    let server = Server::of(large()).await;
    stand(&server).fetch(&request("s3://bucket/signer.eif?versionId=v1")).await.unwrap();
    let asked = server.asked();
    assert!(asked.iter().all(|asked| asked.path.contains("versionId=v1")), "{asked:?}");
}

fn sha256(bytes: &[u8]) -> (&'static str, String) {
    ("x-amz-checksum-sha256", base64::encode(Sha256::digest(bytes)))
}

#[tokio::test]
async fn bytes_that_differ_from_the_objects_checksum_are_fetched_anew_once() {
    let corrupt = |asked: &Asked, before| match asked.is_part(2 * PART) && before == 0 {
        true => Deed::Corrupt(7),
        false => Deed::Serve,
    };
    let server = Server::with(large(), corrupt).await;
    server.change(|object| object.headers.push(sha256(&large())));
    let stand = stand(&server);
    let image = stand.fetch(&s3()).await.unwrap();
    assert_eq!(contents(&stand, &image), large());
    assert_eq!(server.parts().len(), 2 * every_part().len());

    // One that is wrong itself: both values are told.
    let server = Server::of(large()).await;
    server.change(|object| object.headers.push(sha256(b"x")));
    let stand = self::stand(&server);
    let failure = stand.fetch(&s3()).await.unwrap_err();
    for value in [sha256(b"x").1, sha256(&large()).1] {
        assert!(failure.message.contains(&value) && failure.message.contains("SHA256"), "{failure}");
    }
    assert_eq!(server.parts().len(), 2 * every_part().len());
    assert_eq!(stand.kept(), [""; 0]);
    // It may have been damaged on its way, so whoever needs it tries again.
    stand.fetch(&s3()).await.unwrap_err();
    assert_eq!(server.parts().len(), 4 * every_part().len());
}

#[tokio::test]
async fn a_checksum_of_checksums_is_not_compared() {
    let server = Server::of(large()).await;
    server.change(|object| {
        object.headers.push(("x-amz-checksum-sha256", "AAAA-3".to_owned()));
        object.headers.push(("x-amz-checksum-type", "COMPOSITE".to_owned()));
    });
    stand(&server).fetch(&s3()).await.unwrap();
}

#[tokio::test]
async fn an_image_that_is_damaged_where_it_lies_is_not_fetched_twice_if_its_checksum_says_so() {
    let damaged = damage::bad_crc(large());
    let server = Server::of(damaged.clone()).await;
    server.change(|object| object.headers.push(sha256(&damaged)));
    let stand = stand(&server);
    let failure = stand.fetch(&s3()).await.unwrap_err();
    assert!(failure.message.contains("CRC"), "{failure}");
    assert_eq!(server.parts().len(), every_part().len());
    assert_eq!(stand.fetch(&s3()).await.unwrap_err(), failure, "it is remembered until it changes");
    assert_eq!(server.parts().len(), every_part().len());
    server.put(large(), "\"two\"");
    stand.fetch(&s3()).await.unwrap();
}

#[tokio::test]
async fn an_object_that_cannot_be_an_image_by_its_size_is_not_fetched() {
    let server = Server::of(Vec::new()).await;
    let stand = stand(&server);
    let failure = stand.fetch(&s3()).await.unwrap_err();
    assert!(failure.message.contains("is empty"), "{failure}");
    assert_eq!(stand.kept(), [""; 0]);
}

#[tokio::test]
async fn a_fetch_that_is_dropped_midway_can_be_continued() {
    let server = Server::with(large(), |asked, before| match asked.is_part(8 * PART) && before == 0 {
        true => Deed::Hang,
        false => Deed::Serve,
    })
    .await;
    let stand = stand(&server);
    let progress = Arc::new(Progress::default());
    let request = s3();
    let fetch = stand.store.fetch(&request, Prefer::Cached, progress.clone());
    let mut fetch = Box::pin(fetch);
    let until_most_came = async {
        while progress.get().0 < 8 * PART {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    tokio::select! {
        _ = &mut fetch => panic!("it hangs"),
        () = until_most_came => {}
    }
    assert!(stand.store.remove(&CacheItem::Unfinished(s3())).await.is_err(), "it is at work");
    drop(fetch);
    let image = stand.fetch(&s3()).await.unwrap();
    assert_eq!(contents(&stand, &image), large());
    assert_eq!(stand.kept(), ["eif", "json"]);
}

#[tokio::test]
async fn an_s3_that_cannot_be_reached_is_told_with_what_to_check() {
    let stand = stand_at(NOWHERE);
    let failure = stand.fetch(&s3()).await.unwrap_err();
    assert!(failure.message.contains("could not get s3://bucket/signer.eif"), "{failure}");
    assert!(failure.message.contains("tried 3 times"), "{failure}");
    assert!(failure.remedy.unwrap().contains("route"));
}

#[tokio::test]
async fn a_download_whose_file_cannot_be_opened_any_more_is_begun_anew() {
    let server = Server::with(large(), |asked, before| match asked.is_part(3 * PART) && before == 0 {
        true => refuse(403, "AccessDenied"),
        false => Deed::Serve,
    })
    .await;
    let stand = stand(&server);
    stand.fetch(&s3()).await.unwrap_err();
    let resume = sidecar::Resume::read(&stand.store.cache.resume_path(&s3()).unwrap()).unwrap().unwrap();
    let path = stand.folder.path().join("images").join(&resume.file);
    // A link to itself: nobody can open that, not even those whom no permission stops.
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&path, &path).unwrap();
    let image = stand.fetch(&s3()).await.unwrap();
    assert_eq!(contents(&stand, &image), large());
    assert_eq!(stand.kept(), ["eif", "json"]);
}

#[tokio::test]
async fn data_that_were_not_flushed_once_are_not_believed_to_be_on_disk_by_a_later_flush() {
    let server = Server::of(large()).await;
    let mut stand = stand(&server);
    let synced = AtomicU32::new(0);
    // The first is the sidecar's. That the second fails the kernel says once.
    stand.on_disk(Watch::intervening(move |kind| {
        let is_second = kind == "synced" && synced.fetch_add(1, Relaxed) == 1;
        if is_second { Err(io::Error::other("it is failing")) } else { Ok(()) }
    }));
    let failure = stand.fetch(&s3()).await.unwrap_err();
    assert!(failure.message.contains("writing it failed: it is failing"), "{failure}");
    assert!(failure.remedy.unwrap().contains("check the disk"));
    assert_eq!(stand.kept(), [""; 0]);
    let image = stand.fetch(&s3()).await.unwrap();
    assert_eq!(contents(&stand, &image), large());
}

#[tokio::test]
async fn a_download_that_finds_the_disk_full_midway_says_what_it_lacks_and_gives_its_space_back() {
    let server = Server::of(large()).await;
    let mut stand = stand(&server);
    let changed = AtomicU32::new(0);
    // The first sets space aside, the second writes the sidecar, the third is the first of the data.
    stand.on_disk(Watch::intervening(move |kind| {
        let is_data = kind == "changed" && changed.fetch_add(1, Relaxed) >= 2;
        if is_data { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }));
    let failure = stand.fetch(&s3()).await.unwrap_err();
    assert!(failure.message.contains("has no space for the image: "), "{failure}");
    assert!(failure.message.contains("MiB are free"), "{failure}");
    assert_eq!(stand.kept(), [""; 0]);
}

#[tokio::test]
async fn a_download_is_only_continued_where_there_is_space_for_the_rest() {
    let stand = Stand::new();
    let cache = &stand.store.cache;
    let incoming = cache.incoming().unwrap();
    let free = {
        let system = rustix::fs::statvfs(stand.folder.path()).unwrap();
        system.f_blocks * system.f_frsize
    };
    // Sparse: nothing is set aside.
    incoming.file().set_len(free).unwrap();
    let object = stamp::Object { etag: Some("\"a\"".to_owned()), modified: None, size: free, version: None };
    let part = free.div_ceil(10);
    let resume = sidecar::Resume::new(&s3(), incoming.name(), &object, part);
    cache.write_json(&cache.resume_path(&s3()).unwrap(), &resume).unwrap();
    let _stays = incoming.resumable();
    let failure = cache.begin_download(&s3(), &object, Some(part)).unwrap_err();
    assert!(failure.message.contains("MiB are free"), "{failure}");
    assert_eq!(stand.kept(), ["partial", "resume"], "what is there is not lost for it");
}

#[tokio::test]
async fn a_download_that_could_not_be_read_back_is_not_thrown_away() {
    let server = Server::of(large()).await;
    let mut stand = stand(&server);
    let progress = Arc::new(Progress::default());
    let (images, arrived) = (stand.folder.path().join("images"), Arc::clone(&progress));
    stand.on_disk(Watch::intervening(move |kind| {
        // When all is written, and the end of it is not read yet, since it fills no whole piece.
        if kind == "synced" && arrived.get() == (large().len() as u64, large().len() as u64) {
            let entries = fs::read_dir(&images).unwrap().map(|entry| entry.unwrap().path());
            let partial = entries.into_iter().find(|path| path.extension().is_some_and(|end| end == "partial"));
            File::options().write(true).open(partial.unwrap()).unwrap().set_len(0).unwrap();
        }
        Ok(())
    }));
    let failure = stand.store.fetch(&s3(), Prefer::Cached, progress).await.unwrap_err();
    assert!(failure.message.contains("could not be taken: reading it failed"), "{failure}");
    assert_eq!(stand.kept(), ["partial", "resume"]);
}
