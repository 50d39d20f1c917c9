//! How images are kept: fetched ahead, watched at their source, proven before each launch, collected when nobody needs them,
//! and not launched where that can't work.

use crate::fixture::{Host, eventually, kill, of};
use crate::traffic::Client;
use enclaved_core::status::{EnclaveState, EnclaveStatus, Status};
use enclaved_integration::eif::Eif;
use enclaved_integration::file_server::{FileServer, Manners};
use enclaved_integration::s3::S3Fault;
use enclaved_integration::signing::{Signer, Validity};
use std::collections::BTreeSet;
use std::fs;

/// The image of the sample application, with a kernel of that many bytes.
fn image(host: &Host, label: &str, kernel: usize) -> Vec<u8> {
    let ramdisks = vec![b"simulated init".to_vec(), host.application(label).to_line()];
    Eif::new(vec![7; kernel], "reboot=k panic=30", ramdisks).to_bytes()
}

async fn put(host: &Host, key: &str, bytes: Vec<u8>) {
    host.machine.s3.put(host.machine.bucket(), key, bytes).await.unwrap();
}

/// The digests of the images on disk.
fn kept(host: &Host) -> BTreeSet<String> {
    let files = fs::read_dir(host.machine.state_dir().join("images")).unwrap();
    let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    names.filter_map(|name| name.strip_suffix(".eif").map(str::to_owned)).collect()
}

fn digest(signer: &EnclaveStatus) -> String {
    signer.image_digest.unwrap().to_string()
}

/// `signer`, whose source is watched.
fn watched(host: &Host) -> String {
    host.signer().replace("cpus = 2", "image_poll = \"1s\"\ncpus = 2")
}

/// How often something was read from S3.
fn reads(host: &Host) -> usize {
    host.machine.s3.answered().iter().filter(|answered| answered.method == "GET" && answered.status < 300).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watched_object_that_changes_is_brought_in_and_one_that_does_not_launches_nothing() {
    let host = Host::with_image().await;
    host.configure(&watched(&host));
    host.start();
    host.until_ready().await;
    let first = host.until_signer("its source was asked", |signer| signer.image_polled_at.is_some()).await;
    let polled = first.image_polled_at;
    host.until_signer("once more", |signer| signer.image_polled_at > polled).await;
    assert_eq!(host.launches().len(), 1);
    let pcr0 = host.put("signer.eif", &host.application("v2")).await;
    host.until_signer("the new one serves alone", |signer| {
        signer.ready && signer.pcr0.is_some_and(|of| of.to_string() == pcr0) && signer.others.is_empty()
    })
    .await;
    assert_eq!(Client::new(&host, "localhost").answer().await.label, "v2");
    assert_eq!(host.launches().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watched_object_that_is_refused_changes_nothing_is_told_and_is_not_downloaded_again() {
    let host = Host::empty().await;
    let pcr0 = host.put("signer.eif", &host.application("v1")).await;
    host.configure(&format!("{}[enclave.measurements]\npcr0 = \"{pcr0}\"\n", watched(&host)));
    host.start();
    let before = host.until_ready().await;
    put(&host, "signer.eif", image(&host, "v2", 2 << 20)).await;
    let refused = host.until("the new one is refused", |status| {
        status.problems.iter().any(|problem| problem.about == "signer" && problem.failure.message.contains("PCR0"))
    });
    assert!(refused.await.ready, "what runs is not touched by it");
    let reads_then = reads(&host);
    let asked = host.machine.s3.answered().len();
    eventually("its source is asked twice more", async || {
        (host.machine.s3.answered().len() >= asked + 2).then_some(())
    })
    .await;
    assert!(reads(&host) <= reads_then + 3, "it is not downloaded again");
    let after = host.until_ready().await;
    assert_eq!(of(&after, "signer").pid, of(&before, "signer").pid);
    // When the right one is back, nothing is left of the problem.
    host.put("signer.eif", &host.application("v1")).await;
    host.until("the problem is gone", |status| status.problems.is_empty()).await;
    assert_eq!(host.launches().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watched_object_that_cannot_be_launched_takes_nothing_over_not_even_after_a_death() {
    let host = Host::with_image().await;
    host.configure(&watched(&host));
    host.start();
    let before = host.until_ready().await;
    put(&host, "signer.eif", image(&host, "v2", 20 << 20)).await;
    let told =
        |status: &Status| status.problems.iter().any(|problem| problem.failure.message.contains("needs an enclave of"));
    host.until("its size is told", told).await;
    let signer = of(&before, "signer");
    kill(signer.pid.unwrap());
    host.until_signer("the former one is launched again", |now| now.ready && now.pid != signer.pid).await;
    let again = host.until_ready().await;
    host.kill_daemon();
    kill(of(&again, "signer").pid.unwrap());
    host.start();
    let after = host.until_signer("also by another life of the daemon", |now| now.ready && now.restarts == 2).await;
    assert_eq!(after.image_digest, signer.image_digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_too_large_for_its_enclave_is_not_launched_and_the_memory_it_needs_is_told() {
    let host = Host::empty().await;
    put(&host, "signer.eif", image(&host, "v1", 20 << 20)).await;
    host.configure(&host.signer());
    host.start();
    let signer = host
        .until_signer("it waits", |signer| signer.waiting_for.as_deref().is_some_and(|why| why.contains("memory_mib")))
        .await;
    let why = signer.waiting_for.unwrap();
    assert!(why.contains("21 MiB") && why.contains("memory_mib = 81"), "{why}");
    assert_eq!((signer.state, host.launches().len()), (EnclaveState::Waiting, 0));
    let said = host.ctl(&["fetch"]);
    assert!(said.code == Some(78) && said.stderr.contains("memory_mib = 81"), "{said:?}");
    host.configure(&host.signer().replace("memory_mib = 64", "memory_mib = 96"));
    host.ctl_ok(&["reload"]);
    host.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_fetched_ahead_is_there_when_the_update_comes_even_if_s3_is_away_by_then() {
    let host = Host::ready().await;
    host.put("signer-2.eif", &host.application("v2")).await;
    let source = format!("s3://{}/signer-2.eif", host.machine.bucket());
    let told = host.ctl_ok(&["fetch", "--json", &source]);
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    let sha256 = told[0]["digest"].as_str().unwrap();
    assert!(kept(&host).contains(sha256));
    host.machine.s3.add_fault(S3Fault::Unavailable, None);
    let signer = host.machine.sample_enclave("signer", "signer-2.eif");
    host.configure(&format!("{signer}[enclave.measurements]\nsha256 = \"{sha256}\"\n"));
    host.ctl_ok(&["reload"]);
    host.until_signer("the new one serves", |signer| signer.ready && digest(signer) == sha256).await;
    let missing = host.ctl(&["fetch", &format!("s3://{}/none.eif", host.machine.bucket())]);
    assert!(missing.code == Some(78) && missing.stderr.contains("none.eif"), "{missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_spoilt_on_disk_is_never_launched_but_fetched_again() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    let signer = of(&before, "signer");
    let file = host.machine.state_dir().join("images").join(format!("{}.eif", digest(signer)));
    let good = fs::read(&file).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    fs::remove_file(&file).unwrap();
    fs::write(&file, bad).unwrap();
    kill(signer.pid.unwrap());
    host.until_signer("it serves again", |now| now.ready && now.pid != signer.pid).await;
    assert_eq!(fs::read(&file).unwrap(), good);
    let lines = host.log_lines("its image is fetched again");
    assert!(lines.len() == 1 && lines[0].contains(&digest(signer)), "{lines:?}");
    assert_eq!(host.launches().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_image_that_runs_and_the_one_before_it_stay_where_nothing_more_is_to_be_kept() {
    let host = Host::with_image().await;
    let configure = |enclave: &str| {
        let text = host.machine.host_config() + enclave;
        host.machine.write_config(&text.replace("[host]\n", "[host]\nimage_cache_mib = 0\n")).unwrap();
    };
    configure(&host.signer());
    host.start();
    let mut digests = vec![digest(of(&host.until_ready().await, "signer"))];
    for label in ["v2", "v3"] {
        let key = format!("signer-{label}.eif");
        host.put(&key, &host.application(label)).await;
        configure(&host.machine.sample_enclave("signer", &key));
        host.ctl_ok(&["reload"]);
        let last = digests.last().unwrap().clone();
        let signer = host
            .until_signer("the new one serves alone", |signer| {
                signer.ready && digest(signer) != last && signer.others.is_empty()
            })
            .await;
        digests.push(digest(&signer));
    }
    let wanted: BTreeSet<_> = digests.drain(1..).collect();
    eventually("the oldest is gone", async || (kept(&host) == wanted).then_some(())).await;
    let metrics = host.ask_publicly("/metrics").await.unwrap().1;
    assert!(metrics.contains("\nenclaved_image_cache_images 2\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_goes_on_where_it_was_after_the_daemon_was_killed() {
    let host = Host::empty().await;
    let bytes = image(&host, "v1", 100 << 20);
    let size = bytes.len() as u64;
    put(&host, "signer.eif", bytes).await;
    host.machine.s3.controls().set_rate(Some(24 << 20));
    host.configure(&host.signer().replace("memory_mib = 64", "memory_mib = 512"));
    host.start();
    // Parts that came whole are written down every second.
    let progress = |signer: &EnclaveStatus| signer.fetch.is_some_and(|fetch| fetch.bytes > 85 << 20);
    host.until_signer("most has come", progress).await;
    host.kill_daemon();
    let asked = host.machine.s3.answered().len();
    host.machine.s3.controls().set_rate(None);
    host.start();
    let line = eventually("it says what it goes on with", async || host.log_lines("that are on disk").pop()).await;
    assert!(line.contains("signer.eif"), "{line}");
    host.until_ready().await;
    let ranges: u64 = host.machine.s3.answered()[asked..]
        .iter()
        .filter_map(|answered| answered.range.as_deref()?.strip_prefix("bytes=")?.split_once('-'))
        .map(|(from, to)| to.parse::<u64>().unwrap() - from.parse::<u64>().unwrap() + 1)
        .sum();
    assert!(ranges < size * 3 / 4, "{ranges} of {size} bytes were asked for again");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_whose_certificate_has_expired_is_not_launched_and_the_date_is_told() {
    let host = Host::empty().await;
    let ramdisks = vec![b"simulated init".to_vec(), host.application("v1").to_line()];
    let image = Eif::new(vec![7; 1000], "reboot=k panic=30", ramdisks);
    let signed = Signer::new("signer", Validity::Expired).unwrap().sign(image).unwrap();
    put(&host, "signer.eif", signed.to_bytes()).await;
    host.configure(&host.signer());
    host.start();
    let expired = |signer: &EnclaveStatus| signer.waiting_for.as_deref().is_some_and(|why| why.contains("expired at"));
    let signer = host.until_signer("it waits", expired).await;
    assert!(signer.waiting_for.unwrap().contains("E36"));
    assert_eq!((signer.state, host.launches().len()), (EnclaveState::Waiting, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_presigned_address_is_used_and_its_secret_is_nowhere_to_be_read() {
    const SECRET: &str = "X-Amz-Signature=5ec7e7";
    let host = Host::empty().await;
    let server = FileServer::start_tls(Manners::PRESIGNED).await.unwrap();
    server.set_secret(SECRET);
    server.put("/signer.eif", image(&host, "v1", 1 << 20));
    let authority = host.machine.path().join("authority.pem");
    fs::write(&authority, server.authority().unwrap()).unwrap();
    let address = server.url("/signer.eif");
    let s3 = format!("s3://{}/signer.eif", host.machine.bucket());
    host.configure(&host.signer().replace(&s3, &address));
    let mut command = host.machine.command("enclaved").unwrap();
    command.arg("--config").arg(host.machine.config_file()).env("SSL_CERT_FILE", &authority);
    host.started(host.machine.start_program(command).unwrap());
    host.until_ready().await;
    assert!(server.requests().iter().any(|request| request.range.is_some()), "it came in parts");
    let missing = address.replace("signer.eif", "none.eif");
    let said = host.ctl(&["fetch", &missing]);
    assert!(said.code == Some(78) && said.stderr.contains("none.eif?…"), "{said:?}");
    let mut shown = format!("{said:?}{}", host.machine.log());
    for arguments in [&["status"][..], &["status", "--json"], &["status", "signer"], &["plan"]] {
        shown.push_str(&host.ctl_ok(arguments));
    }
    shown.push_str(&host.ask_publicly("/metrics").await.unwrap().1);
    shown.extend(host.machine.control_plane.reports().iter().map(|report| report.body.to_string()));
    assert!(shown.contains("signer.eif?…") && !shown.contains("5ec7e7"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_measured_where_it_is_and_nothing_of_it_stays_on_disk() {
    let host = Host::empty().await;
    put(&host, "signer.eif", image(&host, "v1", 1 << 20)).await;
    put(&host, "broken.eif", vec![1; 10_000]).await;
    let url = |key: &str| format!("s3://{}/{key}", host.machine.bucket());
    let file = host.machine.path().join("signer.eif");
    fs::write(&file, image(&host, "v1", 1 << 20)).unwrap();
    let of_file: serde_json::Value =
        serde_json::from_str(&host.ctl_ok(&["measure", "--json", file.to_str().unwrap()])).unwrap();
    let of_url: serde_json::Value =
        serde_json::from_str(&host.ctl_ok(&["measure", "--json", &url("signer.eif")])).unwrap();
    assert_eq!(of_url, of_file);
    let said = host.ctl(&["measure", &url("broken.eif")]);
    assert!(said.code == Some(78) && said.stderr.contains("not an EIF"), "{said:?}");
    let said = host.ctl(&["measure", &url("none.eif")]);
    assert!(said.code == Some(75) && said.stderr.contains("none.eif"), "{said:?}");
    let left: Vec<_> = fs::read_dir(host.machine.path().join("home")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Credentials come from where an AWS SDK looks for them: here the environment, and a container's service (ECS, EKS).
#[tokio::test(flavor = "multi_thread")]
async fn without_a_metadata_service_the_environments_or_the_containers_credentials_are_used() {
    for of_container in [false, true] {
        let host = Host::with_image().await;
        let credentials = host.machine.imds.credentials().for_container();
        let service = FileServer::start(Manners::GOOD).await.unwrap();
        let until = humantime::format_rfc3339_seconds(credentials.expires);
        let answer = serde_json::json!({
            "AccessKeyId": credentials.access_key_id, "SecretAccessKey": credentials.secret_access_key,
            "Token": credentials.token, "Expiration": until.to_string(),
        });
        service.put("/credentials", answer.to_string());
        let mut command = host.machine.command("enclaved").unwrap();
        command.arg("--config").arg(host.machine.config_file());
        command.env("AWS_EC2_METADATA_DISABLED", "true").env("AWS_REGION", "us-east-1");
        if of_container {
            command.env("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.url("/credentials"));
        } else {
            command.env("AWS_ACCESS_KEY_ID", &credentials.access_key_id);
            command.env("AWS_SECRET_ACCESS_KEY", &credentials.secret_access_key);
            command.env("AWS_SESSION_TOKEN", &credentials.token);
        }
        host.configure(&host.signer());
        host.started(host.machine.start_program(command).unwrap());
        host.until_ready().await;
        let asked = host.machine.s3.authenticated();
        assert!(asked.iter().all(|request| request.access_key_id == credentials.access_key_id), "{asked:?}");
        assert!(!asked.is_empty() && of_container != service.requests().is_empty());
    }
}
