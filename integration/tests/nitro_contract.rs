//! The daemon's own nitro-cli port against the stand-in: what one says, the other understands, hazards included.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use enclaved::nitro_cli::{Flag, Mark, NitroCli, RunError, RunRequest, State};
use enclaved_core::failure::ECode;
use enclaved_core::id::{Cid, MemoryMib};
use enclaved_integration::application::Application;
use enclaved_integration::nitro_cli::Code;
use enclaved_integration::nitro_cli::faults::{Fault, Hazard};
use enclaved_integration::nitro_host::{NitroHost, Shape, image};
use enclaved_integration::processes::is_alive;
use std::time::{Duration, Instant};

fn host() -> (NitroHost, NitroCli) {
    let host = NitroHost::new(&Shape::small()).unwrap();
    let cli = NitroCli::new(host.nitro_cli());
    (host, cli)
}

fn request(host: &NitroHost, name: &str) -> RunRequest {
    let path = host.path().join("app.eif");
    std::fs::write(&path, image(&Application::http("v1", 8080))).unwrap();
    let (cid, memory) = (Cid::FIRST, MemoryMib(64));
    let mark = Mark(host.path().join(name));
    RunRequest { image: path, name: name.to_owned(), cid, cpus: 2, memory, debug: false, mark }
}

#[tokio::test]
async fn an_enclave_is_launched_described_and_ended() {
    let (host, cli) = host();
    let record = cli.run_enclave(&request(&host, "signer-1"), |_| {}).await.unwrap();
    assert!(is_alive(record.process.pid));
    assert_eq!((record.memory, record.cpu_ids.as_slice()), (MemoryMib(64), [1, 5].as_slice()));
    let described = cli.describe_enclaves().await.unwrap();
    assert_eq!(described.incomplete, None);
    let [enclave] = described.enclaves.as_slice() else { panic!("{described:?}") };
    assert_eq!((&enclave.state, &enclave.flags), (&State::Running, &Flag::None));
    assert_eq!(enclave.enclave_id, record.enclave_id);
    cli.terminate_enclave(&record.enclave_id).await.unwrap();
    let began = Instant::now();
    while is_alive(record.process.pid) {
        assert!(began.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(cli.describe_enclaves().await.unwrap().enclaves, []);
}

#[tokio::test]
async fn a_code_from_inside_is_found_before_the_last_one() {
    let (host, cli) = host();
    for code in [27, 29, 36] {
        host.switch_on(&[Hazard::once("run-enclave", Fault::FailInside { code: Code(code) })]).unwrap();
        let refused = cli.run_enclave(&request(&host, "signer-1"), |_| {}).await.unwrap_err();
        let (RunError::NotRunning(failure) | RunError::Unclear(failure)) = refused;
        assert_eq!(failure.code, Some(ECode(code)), "{failure:?}");
    }
}

#[tokio::test]
async fn an_answer_that_is_lost_leaves_it_open_whether_an_enclave_runs() {
    let (host, cli) = host();
    for fault in [Fault::GarbledAnswer, Fault::KilledBeforeAnswer] {
        host.switch_on(&[Hazard::once("run-enclave", fault.clone())]).unwrap();
        let lost = cli.run_enclave(&request(&host, "signer-1"), |_| {}).await;
        assert!(matches!(lost, Err(RunError::Unclear(_))), "{fault:?}: {lost:?}");
        let described = cli.describe_enclaves().await.unwrap();
        assert_eq!(described.enclaves.len(), 1, "{fault:?}");
        cli.terminate_enclave(&described.enclaves[0].enclave_id).await.unwrap();
    }
}

#[tokio::test]
async fn an_enclave_that_got_another_name_is_not_taken() {
    let (host, cli) = host();
    cli.run_enclave(&request(&host, "signer-1"), |_| {}).await.unwrap();
    let again = RunRequest { cid: Cid::FIRST.next(), ..request(&host, "signer-1") };
    assert!(cli.run_enclave(&again, |_| {}).await.is_err());
    assert_eq!(cli.describe_enclaves().await.unwrap().enclaves.len(), 1, "the renamed one was ended");
}
