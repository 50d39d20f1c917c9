//! A changed image.

use crate::fixture::{Host, of};
use crate::traffic::{Client, Load};
use enclaved_integration::processes::is_alive;

#[tokio::test(flavor = "multi_thread")]
async fn a_new_image_takes_over_without_a_failed_request() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    let load = Load::start(Client::new(&host, "localhost"));
    let pcr0 = host.put("signer-2.eif", &host.application("v2")).await;
    let signer = host.machine.sample_enclave("signer", "signer-2.eif");
    host.configure(&format!("{signer}[enclave.measurements]\npcr0 = \"{pcr0}\"\n"));
    host.ctl_ok(&["reload"]);
    let after = host
        .until("the new one serves alone", |status| {
            let signer = of(status, "signer");
            status.ready && signer.pcr0.is_some_and(|of| of.to_string() == pcr0) && signer.others.is_empty()
        })
        .await;
    assert_eq!(Client::new(&host, "localhost").answer().await.label, "v2");
    let report = load.end().await;
    assert!(report.labels.contains_key("v1") && report.labels.contains_key("v2"), "{report:?}");
    assert!(!is_alive(of(&before, "signer").pid.unwrap()), "the old one was ended");
    let (old, new) = (of(&before, "signer").generation.unwrap(), of(&after, "signer").generation.unwrap());
    assert!(new > old && of(&after, "signer").restarts == 0);
    assert_eq!(host.launches().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_to_an_image_that_is_not_what_it_must_be_leaves_what_runs_alone() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    host.put("signer-2.eif", &host.application("v2")).await;
    let pcr0 = of(&before, "signer").pcr0.unwrap();
    let signer = host.machine.sample_enclave("signer", "signer-2.eif");
    host.configure(&format!("{signer}[enclave.measurements]\npcr0 = \"{pcr0}\"\n"));
    host.ctl_ok(&["reload"]);
    let refused = host.until_signer("the new image is refused", |signer| signer.last_error.is_some()).await;
    assert!(refused.last_error.unwrap().failure.message.contains("PCR0"));
    assert_eq!((refused.pid, refused.ready), (of(&before, "signer").pid, true));
    assert_eq!(Client::new(&host, "localhost").answer().await.label, "v1");
    assert_eq!(host.launches().len(), 1);
}
