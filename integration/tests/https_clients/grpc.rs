//! gRPC, with Google's own implementation on both sides of the proxy. What they call is in `grpc_calls.py`.

use crate::{DOMAIN, python};
use enclaved_core::routes::UpstreamHttp;
use enclaved_integration::https_site::{HttpsSites, Site, runtime};

#[test]
fn grpc_calls_of_every_kind_come_through_with_their_metadata_trailers_and_status() {
    let program = || python("grpc_calls.py", "python3-grpcio");
    let server = program().arg("serve").serve().unwrap();
    let site = Site { domain: DOMAIN, port: server.port, upstream: UpstreamHttp::H2c };
    let sites = HttpsSites::start(&[site], runtime().unwrap()).unwrap();
    let address = sites.https.to_string();
    let visit = |what: &str| program().args([what, &address, DOMAIN]).arg(&sites.root).run().unwrap().ok();
    assert_eq!(visit("call").stdout, "all as it should be\n");
    // Who has no application gets the status that says: again, later.
    drop(server);
    assert_eq!(visit("fail").stdout, "unavailable\n");
}
