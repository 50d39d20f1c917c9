use super::*;
use crate::certificates::internal_ca::InternalCa;
use crate::ingress::tls;
use crate::ingress::upstream::Upstreams;
use crate::limits::Limits;
use enclaved_core::routes::{ROUTES_FORMAT, TcpRules};
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::timeout;

/// A plane in a folder of its own, and the disk that it saves on.
fn plane() -> (Arc<Plane>, TempDir, Arc<Mutex<()>>) {
    let folder = tempfile::tempdir().unwrap();
    let shared = Arc::new(Shared::new(Limits { settle: Duration::from_millis(100), ..Limits::default() }));
    let provider = tls::provider();
    let certificates = Arc::new(InternalCa::new(folder.path().join("ca"), provider.clone()));
    let upstreams = Arc::new(Upstreams::new(shared.clone(), Transport::AfVsock));
    let https = Https::new(shared.clone(), provider, certificates, upstreams).unwrap();
    let store = Store::new(folder.path().join("routes.json"));
    let disk = store.disk();
    (Arc::new(Plane::new(shared, Arc::new(https), store)), folder, disk)
}

fn a_port(vsock_port: u32) -> Routes {
    let port = TcpRoute {
        enclave: "signer".parse().unwrap(),
        listen: "127.0.0.1:0".parse().unwrap(),
        vsock_port,
        target: None,
        rules: TcpRules::default(),
    };
    Routes { format: ROUTES_FORMAT, tcp: vec![port], ..Routes::default() }
}

#[tokio::test]
async fn a_disk_that_hangs_keeps_no_routes_from_being_served_nor_anybody_from_asking() {
    let (plane, folder, disk) = plane();
    let at_once = Duration::from_secs(10);
    {
        let _hangs = disk.lock().await;
        for vsock_port in 1..=3 {
            let routes = a_port(vsock_port);
            timeout(at_once, plane.publish(routes.clone())).await.expect("publishing waits for the disk").unwrap();
            let report = timeout(at_once, plane.report()).await.expect("a report waits for the disk");
            assert_eq!((report.revision, &report.listeners[0].error), (Some(routes.revision()), &None));
            timeout(at_once, plane.maintain()).await.expect("maintenance waits for the disk");
        }
        assert!(!folder.path().join("routes.json").exists());
    }
    // The disk goes on: what is served is what a successor finds.
    timeout(at_once, plane.publish(a_port(3))).await.unwrap().unwrap();
    let settled = async {
        while Store::new(folder.path().join("routes.json")).load() != (Some(a_port(3)), None) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(at_once, settled).await.expect("the last routes are not on disk");
}
