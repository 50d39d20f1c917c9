//! The link: what a control process, or anyone, may send, and what comes back.

use crate::support::{DEADLINE, Enclave, Host, cid, https_address, soon};
use enclaved_core::routes::{LinkReply, LinkRequest, limits};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

#[tokio::test]
async fn garbage_is_refused_with_its_reason_and_the_link_goes_on() {
    let host = Host::new().await;
    let mut link = BufReader::new(host.link().await);
    for garbage in [&b"\n"[..], b"{}\n", b"\"repor\"\n", b"\xff\xfe\n", b"{\"publish\":{\"routes\":{}}}\n", b"[[[[[[\n"]
    {
        link.write_all(garbage).await.unwrap();
        let mut line = String::new();
        soon("the refusal", link.read_line(&mut line)).await.unwrap();
        let reply: LinkReply = serde_json::from_str(&line).unwrap();
        assert!(matches!(reply, LinkReply::Refused { .. }), "{}: {line}", garbage.escape_ascii());
    }
    link.write_all(b"\"report\"\n").await.unwrap();
    let mut line = String::new();
    soon("the report", link.read_line(&mut line)).await.unwrap();
    assert!(line.starts_with("{\"report\":"), "{line}");
}

#[tokio::test]
async fn a_flood_without_a_newline_is_cut_off_at_the_limit() {
    let host = Host::new().await;
    let mut link = host.link().await;
    let flood = vec![b'['; 1 << 20];
    let mut sent = 0;
    let mut answer = String::new();
    let (mut reader, mut writer) = link.split();
    let flooding = async {
        while writer.write_all(&flood).await.is_ok() {
            sent += flood.len();
            assert!(sent < limits::LINK_LINE_BYTES * 4, "a flood of {sent} bytes was taken");
        }
    };
    // After the refusal the rest of the flood meets a closed socket, which may take the answer with it.
    let ((), _) = soon("the refusal", async { tokio::join!(flooding, reader.read_to_string(&mut answer)) }).await;
    host.report().await;
}

#[tokio::test]
async fn a_snapshot_that_makes_no_sense_is_refused_and_nothing_changes() {
    let host = Host::new().await;
    let _enclave = Enclave::saying(&host.vsock(), 16, "still here");
    let good = host.site(&["a.test"], Some(16));
    let before = host.publish(&good).await;
    let mut bad = good.clone();
    bad.sites.push(bad.sites[0].clone());
    let reply = host.request(&LinkRequest::Publish { routes: bad }).await;
    let LinkReply::Refused { reason } = reply else { panic!("{reply:?}") };
    assert!(reason.contains("a.test is listed twice"), "{reason}");
    let after = host.report().await;
    assert_eq!((after.revision, after.sequence), (before.revision, before.sequence));
    let mut client = host.http1(https_address(&after), "a.test").await;
    assert_eq!(client.get_text("/").await, (200, "still here".to_owned()));
}

#[tokio::test]
async fn watching_answers_when_something_changes_and_at_once_if_it_has() {
    let host = Host::new().await;
    let seen = host.report().await.sequence;
    let watch = LinkRequest::Watch { seen };
    let publish = async {
        tokio::task::yield_now().await;
        host.publish(&host.site(&["a.test"], None)).await
    };
    let (reply, published) = tokio::join!(host.request(&watch), publish);
    let LinkReply::Report(report) = reply else { panic!("{reply:?}") };
    assert!(report.sequence > seen && report.sequence <= published.sequence);
    let again = tokio::time::timeout(limits::WATCH / 2, host.request(&watch)).await;
    assert!(again.is_ok(), "a change that was missed is waited for");
    const { assert!(DEADLINE.as_secs() > limits::WATCH.as_secs()) };
}

#[tokio::test]
async fn many_clients_are_served_and_too_many_are_told() {
    let host = Host::new().await;
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(host.link().await);
    }
    let mut answer = String::new();
    let mut last = clients.pop().unwrap();
    soon("the refusal", last.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.contains("clients already"), "{answer}");
    drop(clients);
    // Reports come through again.
    let recovered = async {
        loop {
            let mut link = host.link().await;
            let mut line = String::new();
            if link.write_all(b"\"report\"\n").await.is_ok()
                && BufReader::new(link).read_line(&mut line).await.is_ok()
                && line.contains("sequence")
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("the next report", recovered).await;
}

#[tokio::test]
async fn the_socket_is_closed_to_others() {
    let host = Host::new().await;
    let mode = std::fs::metadata(host.options().link).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
}

#[tokio::test]
async fn the_end_of_a_drain_is_reported_at_once() {
    let host = Host::new().await;
    let (release, released) = tokio::sync::watch::channel(false);
    let _enclave = Enclave::http(&host.vsock(), 16, move |_, _| {
        let mut released = released.clone();
        async move {
            released.wait_for(|released| *released).await.unwrap();
            http::Response::new(crate::support::body("done"))
        }
    });
    let mut routes = host.site(&["a.test"], Some(16));
    let address = https_address(&host.publish(&routes).await);
    let mut client = host.http1(address, "a.test").await;
    let request = tokio::spawn(async move { client.get_text("/").await });
    host.until("the request is in flight", |report| report.ingress_open.get(&cid(16)) == Some(&1)).await;
    routes.sites[0].target = None;
    routes.live = vec![cid(16)];
    let draining = host.publish(&routes).await;
    assert_eq!(draining.ingress_open[&cid(16)], 1);
    let watch = LinkRequest::Watch { seen: draining.sequence };
    let (reply, _) = tokio::join!(host.request(&watch), async { release.send(true) });
    assert_eq!(request.await.unwrap(), (200, "done".to_owned()));
    let LinkReply::Report(report) = reply else { panic!("{reply:?}") };
    assert!(report.sequence > draining.sequence && report.ingress_open.is_empty(), "{report:?}");
}
