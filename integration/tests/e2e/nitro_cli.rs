//! A nitro-cli that is missing, or does not do what it says.

use crate::fixture::{Host, of};
use crate::traffic::Client;
use enclaved_core::failure::{ECode, Failure};
use enclaved_core::status::{EnclaveState, EnclaveStatus};
use enclaved_integration::nitro_cli::Code;
use enclaved_integration::nitro_cli::faults::{Fault, Hazard};

fn failed(signer: &EnclaveStatus) -> bool {
    signer.last_error.is_some()
}

/// A host on which the first launch goes wrong like that; gives what the status says of it then.
async fn first_launch_fails(fault: Fault) -> (Host, Failure) {
    let host = Host::with_image().await;
    host.machine.nitro.switch_on(&[Hazard::once("run-enclave", fault)]).unwrap();
    host.configure(&host.signer());
    host.start();
    let signer = host.until_signer("the launch fails", failed).await;
    let failure = signer.last_error.unwrap().failure;
    let shown = host.ctl_ok(&["status", "signer"]);
    assert!(shown.contains(failure.message.lines().next().unwrap()), "{shown}");
    (host, failure)
}

/// The enclaves that run according to nitro-cli itself.
fn running(host: &Host) -> Vec<serde_json::Value> {
    let output = host.machine.nitro.command().arg("describe-enclaves").output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nitro_cli_that_is_missing_is_said_with_its_path_and_found_once_it_is_there() {
    let host = Host::with_image().await;
    let path = host.machine.nitro.nitro_cli();
    let away = path.with_extension("away");
    std::fs::rename(&path, &away).unwrap();
    host.configure(&host.signer());
    host.start();
    let signer = host.until_signer("the launch fails", failed).await;
    let failure = signer.last_error.unwrap().failure;
    assert!(failure.message.contains(path.to_str().unwrap()) && failure.remedy.is_some(), "{failure:?}");
    assert!(host.ctl_ok(&["status"]).contains(path.to_str().unwrap()));
    std::fs::rename(&away, &path).unwrap();
    host.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nitro_cli_that_prints_garbage_is_quoted_and_the_launch_is_made_again() {
    let (host, failure) = first_launch_fails(Fault::Garbage).await;
    assert!(failure.message.contains("nitro-cli"), "{failure:?}");
    host.until_ready().await;
    assert_eq!((host.launches().len(), running(&host).len()), (2, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_exit_39_the_first_code_and_its_remedy_are_shown() {
    let (host, failure) = first_launch_fails(Fault::FailInside { code: Code(27) }).await;
    assert_eq!(failure.code, Some(ECode(27)), "{failure:?}");
    let remedy = failure.remedy.unwrap();
    assert_eq!(Some(remedy.as_str()), ECode(27).explain().unwrap().remedy);
    let shown = host.ctl_ok(&["status"]);
    assert!(shown.contains("E27") && shown.contains("remedy"), "{shown}");
    host.until_ready().await;
    assert_eq!(host.launches().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launch_whose_answer_is_lost_or_wrong_makes_no_second_enclave() {
    for fault in
        [Fault::KilledAfterAnswer, Fault::KilledBeforeAnswer, Fault::SucceedButExit { code: 1 }, Fault::GarbledAnswer]
    {
        let host = Host::with_image().await;
        host.machine.nitro.switch_on(&[Hazard::once("run-enclave", fault.clone())]).unwrap();
        host.configure(&host.signer());
        host.start();
        let status = host.until_ready().await;
        let running = running(&host);
        assert_eq!((host.launches().len(), running.len()), (1, 1), "{fault:?}: {running:?}");
        assert_eq!(running[0]["ProcessID"].as_u64(), of(&status, "signer").pid.map(u64::from));
        Client::new(&host, "localhost").answer().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enclave_that_never_boots_is_reported_as_such_and_tried_again() {
    let (host, failure) = first_launch_fails(Fault::NeverBoots { millis: 100 }).await;
    assert_eq!(failure.code, Some(ECode(36)), "{failure:?}");
    let signer = host.until_signer_is(EnclaveState::Ready).await;
    assert_eq!(running(&host).len(), 1);
    assert!(signer.last_error.is_some());
}
