//! Enclaves that end on their own.

use crate::fixture::{Host, kill, of};
use crate::traffic::{Client, EgressWatch};
use enclaved_core::status::EnclaveStatus;
use enclaved_integration::nitro_cli::faults::{Fault, Hazard};
use std::time::{Duration, Instant};

/// The aim is a second; a machine with much else to do is forgiven the rest.
const NOTICED: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_enclave_is_noticed_at_once_and_launched_again_after_a_pause_while_egress_stays_open() {
    let host = Host::ready().await;
    let before = host.until_ready().await;
    let before = of(&before, "signer");
    let egress = EgressWatch::start(&host);
    let killed = Instant::now();
    kill(before.pid.unwrap());
    let dead = host.until_signer("its death is noticed", |signer| signer.restarts == 1).await;
    let noticed = killed.elapsed();
    println!("the death of the enclave was noticed after {noticed:?}");
    assert!(noticed < NOTICED, "noticed after {noticed:?}");
    let error = dead.last_error.unwrap().failure.message;
    assert!(error.contains("its process is gone"), "{error}");

    let after = host.until_ready().await;
    let after = of(&after, "signer");
    let pause = killed.elapsed();
    assert!(pause >= Duration::from_millis(900), "launched again after {pause:?}, without a pause");
    assert_ne!((after.pid, after.cid, after.generation), (before.pid, before.cid, before.generation));
    assert_eq!((after.restarts, host.launches().len()), (1, 2));
    assert!(after.last_error.is_some(), "what happened is still to be seen");
    assert_eq!(Client::new(&host, "localhost").answer().await.cid, after.cid.unwrap().get());
    egress.end().await;
    let table = host.ctl_ok(&["status"]);
    assert!(table.contains("its process is gone"), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enclave_that_ends_from_inside_is_launched_again() {
    let host = Host::ready().await;
    let inside = Client::new(&host, "localhost").answer().await.pid;
    kill(inside);
    host.until_signer("its death is noticed", |signer| signer.restarts == 1).await;
    host.until_ready().await;
    assert_ne!(Client::new(&host, "localhost").answer().await.pid, inside);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enclave_that_dies_again_and_again_is_launched_after_pauses_that_grow() {
    let host = Host::with_image().await;
    host.machine.nitro.switch_on(&[Hazard::always("run-enclave", Fault::DieAfter { millis: 0 })]).unwrap();
    host.configure(&host.signer());
    host.start();
    host.until_signer("it has died three times", |signer| signer.restarts == 3).await;
    let again =
        |signer: &EnclaveStatus| signer.waiting_for.as_ref().is_some_and(|waits| waits.contains("launched again at"));
    host.until_signer("it waits for the end of its pause", again).await;
    let at: Vec<_> = host.launches().iter().map(|launch| launch.at_millis).collect();
    let [first, second, third] = at.as_slice() else { panic!("three launches, not {at:?}") };
    let (short, long) = (second - first, third - second);
    assert!(short >= 1000 && long >= 2000, "the pauses were {short} ms and {long} ms");
    host.machine.nitro.switch_on(&[]).unwrap();
}
