//! What an operator asks for: stop, start, removal from the configuration.

use crate::fixture::{Host, eventually, of};
use crate::traffic::Client;
use enclaved_core::status::EnclaveState;
use enclaved_integration::processes::is_alive;

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_enclave_stays_stopped_over_reload_and_restart_until_it_is_started() {
    let host = Host::ready().await;
    let pid = of(&host.until_ready().await, "signer").pid.unwrap();
    let client = Client::new(&host, "localhost");
    let slow = tokio::spawn({
        let client = client.clone();
        async move { client.get("/slow?ms=1200").await }
    });
    eventually("the request is under way", async || under_way(&host).await.then_some(())).await;
    assert!(host.ctl_ok(&["stop", "signer"]).contains("kept stopped"));
    assert_eq!(slow.await.unwrap().unwrap().0, 200, "a request under way is finished");
    host.until_signer_is(EnclaveState::Held).await;
    eventually("the enclave is gone", async || (!is_alive(pid)).then_some(())).await;
    assert_eq!(client.get("/").await.unwrap().0, 503);
    host.until("what is held on purpose is no fault", |status| status.ready).await;

    host.hang_up();
    eventually("the reload is done", async || (host.log_lines("configuration is in force").len() > 1).then_some(()))
        .await;
    host.kill_daemon();
    host.start();
    let status = host.until("the restarted daemon is up", |status| status.ready && status.proxy.current).await;
    assert_eq!(of(&status, "signer").state, EnclaveState::Held);
    assert_eq!(host.launches().len(), 1);

    host.ctl_ok(&["start", "signer"]);
    host.ctl_ok(&["wait", "signer", "--timeout", "20s"]);
    assert_eq!(host.launches().len(), 2);
    let signer = host.until_signer_is(EnclaveState::Ready).await;
    assert_eq!((signer.restarts, signer.last_error), (0, None), "nobody had to restart it");
    client.answer().await;
}

/// Whether the proxy carries a request over HTTPS just now.
async fn under_way(host: &Host) -> bool {
    let (_, metrics) = host.ask_publicly("/metrics").await.unwrap();
    let open = metrics.lines().filter(|line| line.starts_with("enclaved_traffic_open{") && line.contains("https"));
    open.into_iter().any(|line| !line.ends_with(" 0"))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enclave_removed_from_the_configuration_is_drained_and_ended() {
    let host = Host::ready().await;
    let pid = of(&host.until_ready().await, "signer").pid.unwrap();
    let client = Client::new(&host, "localhost");
    let slow = tokio::spawn({
        let client = client.clone();
        async move { client.get("/slow?ms=1200").await }
    });
    eventually("the request is under way", async || under_way(&host).await.then_some(())).await;
    host.configure("");
    host.hang_up();
    let (status, body) = slow.await.unwrap().unwrap();
    assert_eq!((status, body.as_ref()), (200, b"done\n".as_slice()), "a request under way is finished");
    let status = host.until("nothing is left of it", |status| status.enclaves.is_empty()).await;
    assert!(!is_alive(pid) && status.ready);
    assert_eq!(host.machine.nitro.free_hugepages().unwrap(), 1024, "its memory was given back");
    let sockets = std::fs::read_dir(host.machine.nitro.vsock()).unwrap().count();
    assert_eq!(sockets, 0, "its sockets are gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_there_is_not_is_refused_with_those_that_there_are() {
    let host = Host::ready().await;
    for command in ["stop", "start"] {
        let said = host.ctl(&[command, "singer"]);
        assert_eq!(said.code, Some(64), "{said:?}");
        assert!(said.stderr.contains("signer"), "{said:?}");
    }
}
