//! WebSockets, with Python's on both sides of the proxy. What they say to each other is in `websocket.py`.

use crate::{DOMAIN, before, python};
use enclaved_integration::https_site::runtime;

#[test]
fn websockets_echo_text_binary_and_large_messages_and_pings_and_close_with_a_reason() {
    let program = || python("websocket.py", "python3-websockets");
    let server = program().arg("serve").serve().unwrap();
    let sites = before(server.port, runtime().unwrap());
    let url = sites.url(DOMAIN).replace("https:", "wss:");
    let said = program().args(["visit", &url]).arg(&sites.root).run().unwrap().ok();
    assert_eq!(said.stdout, "all as it should be\n", "{said}");
}
