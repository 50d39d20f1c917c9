//! From an image in a bucket to an enclave that serves.

use crate::fixture::{Host, eventually, of};
use crate::traffic::Client;
use enclaved_core::status::{EnclaveState, Health};
use enclaved_integration::application::Application;
use enclaved_integration::host::EGRESS_PORT;
use enclaved_integration::nitro_cli::faults::{Fault, Hazard};
use std::time::{Duration, UNIX_EPOCH};

#[tokio::test(flavor = "multi_thread")]
async fn the_image_is_fetched_with_the_roles_credentials_and_launched_with_a_cid_of_its_own() {
    let host = Host::with_image().await;
    let pcr0 = host.put("signer.eif", &host.application("v1")).await;
    host.configure(&(host.signer() + &format!("[enclave.measurements]\npcr0 = \"{pcr0}\"\n")));
    host.start();
    let status = host.until_ready().await;

    let handed_out: Vec<_> = host.machine.imds.credentials().all().into_iter().map(|c| c.access_key_id).collect();
    let gets = host.machine.s3.authenticated();
    let used = |operation| gets.iter().any(|get| get.operation == operation && handed_out.contains(&get.access_key_id));
    assert!(used("GetObject"), "the role's credentials were not used: {gets:?}");
    assert!(gets.iter().all(|get| get.key.as_deref() == Some("signer.eif")));
    let imds = host.machine.imds.record();
    assert!(imds.tokens > 0 && imds.refused_v1 == 0, "{imds:?}");

    let signer = of(&status, "signer");
    assert_eq!((signer.state, &signer.health, signer.restarts), (EnclaveState::Ready, &Health::Healthy, 0));
    assert_eq!(signer.pcr0.unwrap().to_string(), pcr0);
    let launches = host.launches();
    let [launch] = launches.as_slice() else { panic!("one launch, not {launches:?}") };
    let cid = signer.cid.unwrap().to_string();
    let arguments = launch.args.join(" ");
    for expected in ["--cpu-count 2", "--memory 64", "--enclave-name signer-1", &format!("--enclave-cid {cid}")] {
        assert!(arguments.contains(expected), "{expected} is not in {arguments}");
    }
    assert!(!arguments.contains("--debug-mode"));
    assert_eq!(status.host.instance_id.as_deref(), Some("i-0123456789abcdef0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn egress_listens_before_the_launch_and_ingress_has_its_route_after_readiness() {
    let host = Host::with_image().await;
    let application = Application { ready_millis: 600, ..host.application("v1") };
    host.put("signer.eif", &application).await;
    host.configure(&host.signer());
    host.start();
    let booting = host.until_signer_is(EnclaveState::Booting).await;
    eventually("the internal CA is there", async || host.ca().exists().then_some(())).await;
    let early = Client::new(&host, "localhost").get("/health").await.unwrap();
    if host.status().await.is_some_and(|status| !of(&status, "signer").ready) {
        assert_eq!(early.0, 503, "requests reach an enclave that is not ready");
    }
    let socket = host.machine.nitro.vsock().join(format!("{}.sock_{EGRESS_PORT}", booting.cid.unwrap()));
    let listened = std::fs::metadata(socket).unwrap().modified().unwrap().duration_since(UNIX_EPOCH).unwrap();
    let launched = Duration::from_millis(host.launches()[0].at_millis);
    assert!(listened < launched, "egress listened at {listened:?}, the launch was at {launched:?}");
    host.until_ready().await;
    assert_eq!(Client::new(&host, "localhost").get("/health").await.unwrap().0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_enclaves_are_launched_one_after_the_other() {
    let host = Host::with_image().await;
    host.machine.nitro.switch_on(&[Hazard::always("run-enclave", Fault::SlowBoot { millis: 400 })]).unwrap();
    let second = host.machine.sample_enclave("vault", "signer.eif").replace("localhost", "vault.localhost");
    host.configure(&(host.signer() + &second));
    host.start();
    let status = host.until_ready().await;
    let mut launches = host.launches();
    launches.sort_by_key(|launch| launch.at_millis);
    let [first, second] = launches.as_slice() else { panic!("two launches, not {launches:?}") };
    // Two at a time would share the one heartbeat port, and one of them would fail.
    assert!(second.at_millis - first.at_millis >= 400, "launched at the same time");
    assert_eq!((of(&status, "signer").restarts, of(&status, "vault").restarts), (0, 0));
    assert_ne!(of(&status, "signer").cid, of(&status, "vault").cid);
    for (domain, name) in [("localhost", "signer"), ("vault.localhost", "vault")] {
        let answer = Client::new(&host, domain).answer().await;
        assert_eq!(answer.cid, of(&status, name).cid.unwrap().get());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_has_one_line_each_for_the_download_the_launch_and_readiness() {
    let host = Host::ready().await;
    let one = |text: &str| {
        let lines = host.log_lines(text);
        assert_eq!(lines.len(), 1, "lines with {text:?}: {lines:?}");
        lines[0].clone()
    };
    let image = format!("s3://{}/signer.eif", host.machine.bucket());
    assert!(one("fetching the image").contains(&image));
    let verified = one("image is verified");
    assert!(verified.contains(&image) && verified.contains("pcr0="), "{verified}");
    assert!(one("INFO launching").contains("enclave=signer-1"));
    assert!(one("INFO launched").contains("enclave=signer-1"));
    assert_eq!(host.log_lines("INFO launch").len(), 2, "one as it begins, one as it ends");
    assert!(one("INFO ready").contains("enclave=signer-1"));
}
