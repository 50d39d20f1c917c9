//! Images that can't be had, or are not what they must be; and how far a download is.

use crate::fixture::{DEADLINE, Host, of};
use crate::traffic::Client;
use enclaved_core::status::{EnclaveState, EnclaveStatus};
use enclaved_integration::eif::Eif;
use enclaved_integration::imds::ImdsFault;
use enclaved_integration::s3::{Asked, S3Fault};
use std::collections::BTreeSet;

/// The image of the sample application, with a kernel of that many bytes.
fn image(host: &Host, kernel: usize) -> Vec<u8> {
    let ramdisks = vec![b"simulated init".to_vec(), host.application("v1").to_line()];
    Eif::new(vec![7; kernel], "reboot=k panic=30", ramdisks).to_bytes()
}

async fn put(host: &Host, bytes: Vec<u8>) {
    host.machine.s3.put(host.machine.bucket(), "signer.eif", bytes).await.unwrap();
}

/// Waits until the image is refused; gives the message, which `enclavectl` shows, too. Nothing was launched.
async fn refusal(host: &Host) -> String {
    let signer = host.until_signer_is(EnclaveState::ImageFailed).await;
    let failure = signer.last_error.unwrap().failure;
    let shown = host.ctl_ok(&["status", "signer"]);
    assert!(shown.contains(&failure.message), "{shown}");
    assert_eq!(host.launches().len(), 0);
    let line = host.log_lines(&failure.message).pop().unwrap();
    assert!(line.contains("signer.eif"), "{line} does not name the image");
    failure.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_another_measurement_is_refused_and_the_status_has_both_values() {
    let host = Host::empty().await;
    let pcr0 = host.put("signer.eif", &host.application("v1")).await;
    let pinned = "ab".repeat(48);
    host.configure(&format!("{}[enclave.measurements]\npcr0 = \"{pinned}\"\n", host.signer()));
    host.start();
    let message = refusal(&host).await;
    assert!(message.contains("PCR0") && message.contains(&pinned) && message.contains(&pcr0), "{message}");
    let said = host.ctl(&["wait", "--timeout", "0s"]);
    assert!(said.code == Some(75) && said.stderr.contains(&pinned), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_image_is_refused() {
    let host = Host::empty().await;
    let bytes = image(&host, 1000);
    put(&host, bytes[..bytes.len() - 100].to_vec()).await;
    host.configure(&host.signer());
    host.start();
    let message = refusal(&host).await;
    assert!(message.contains("truncated") || message.contains("ends"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_a_wrong_crc_is_refused_and_a_mended_one_is_launched() {
    let host = Host::empty().await;
    let bytes = image(&host, 1000);
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 1;
    put(&host, damaged).await;
    host.configure(&host.signer());
    host.start();
    let message = refusal(&host).await;
    assert!(message.contains("CRC"), "{message}");
    put(&host, bytes).await;
    host.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_s3_refuses_is_said_with_the_objects_name_and_tried_again() {
    for (fault, code) in [(S3Fault::Forbidden, "403"), (S3Fault::NotFound, "404")] {
        let host = Host::with_image().await;
        host.machine.s3.add_fault(fault, None);
        host.configure(&host.signer());
        host.start();
        let message = refusal(&host).await;
        let name = if code == "403" { "AccessDenied" } else { "NoSuchKey" };
        assert!(message.contains(code) || message.contains(name), "{message}");
        host.machine.s3.clear_faults();
        host.until_ready().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_breaks_off_midway_goes_on() {
    let host = Host::empty().await;
    put(&host, image(&host, 1 << 20)).await;
    // HEAD requests, the daemon's checks among them, only look at the object: they have no body that could break off.
    let gets = |asked: &Asked| asked.method == "GET";
    host.machine.s3.controls().add_fault_when(S3Fault::BreakOff { after: 300_000 }, Some(2), gets);
    host.configure(&host.signer());
    host.start();
    let status = host.until_ready().await;
    assert_eq!(of(&status, "signer").last_error, None);
    let lines = host.log_lines("broke off after");
    assert!(lines.len() == 2 && lines[0].contains("signer.eif"), "{lines:?}");
    Client::new(&host, "localhost").answer().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_were_changed_on_the_way_are_fetched_again_and_never_launched() {
    let host = Host::empty().await;
    put(&host, image(&host, 10_000)).await;
    // Within the kernel: everything else of the image is as it should be.
    let gets = |asked: &Asked| asked.method == "GET";
    host.machine.s3.controls().add_fault_when(S3Fault::Corrupt { at: 5000 }, Some(1), gets);
    host.configure(&host.signer());
    host.start();
    let status = host.until_ready().await;
    let lines = host.log_lines("came damaged");
    assert!(lines.len() == 1 && lines[0].contains("signer.eif"), "{lines:?}");
    assert_eq!((of(&status, "signer").restarts, host.launches().len()), (0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_metadata_service_that_is_away_is_named_as_the_reason_and_asked_again() {
    let host = Host::with_image().await;
    host.machine.imds.set_fault(Some(ImdsFault::Down));
    host.configure(&host.signer());
    host.start();
    let message = refusal(&host).await;
    assert!(message.contains("metadata service"), "{message}");
    host.machine.imds.set_fault(None);
    host.until_ready().await;

    let id = "i-0123456789abcdef0";
    host.until("the host knows its name", |status| status.host.instance_id.as_deref() == Some(id)).await;
    host.machine.control_plane.report_where(DEADLINE, |body| body["ready"] == true).await.unwrap();
    let paths: BTreeSet<_> = host.machine.control_plane.reports().into_iter().map(|report| report.path).collect();
    assert_eq!(paths, BTreeSet::from([format!("/v1/hosts/{id}/status")]), "a host has one name");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_shows_how_far_it_is_until_it_is_there() {
    let host = Host::empty().await;
    put(&host, image(&host, 3 << 20)).await;
    host.machine.s3.add_fault(S3Fault::Slow { bytes_per_second: 2 << 20 }, None);
    host.configure(&host.signer());
    host.start();
    let progress = |signer: &EnclaveStatus| signer.fetch.map(|fetch| (fetch.bytes, fetch.total));
    let first = host
        .until_signer("some has come", |signer| {
            progress(signer).is_some_and(|(bytes, total)| 0 < bytes && bytes < total)
        })
        .await;
    let shown = host.ctl_ok(&["status"]);
    assert!(shown.contains("signer: its image, ") && shown.contains("%)"), "{shown}");
    let (bytes, total) = progress(&first).unwrap();
    assert!(total > 3 << 20, "{total}");
    host.until_signer("more has come", |signer| progress(signer).is_some_and(|(now, _)| now > bytes)).await;
    let said = host.ctl(&["wait", "--timeout", "20s", "--progress"]);
    assert!(said.code == Some(0) && said.stderr.contains("signer: fetching"), "{said:?}");
    assert_eq!(of(&host.until_ready().await, "signer").fetch, None);
}
