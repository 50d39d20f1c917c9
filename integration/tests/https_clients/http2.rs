//! HTTP/2 as browsers speak it, with Python's h2 and httpx. What they ask is in `browser.py`.

use crate::{DOMAIN, before, origin, python};
use enclaved_integration::https_site::runtime;

#[test]
fn a_client_that_speaks_http2_as_browsers_do_is_answered() {
    let runtime = runtime().unwrap();
    let origin = runtime.block_on(origin::start());
    let sites = before(origin.address().port(), runtime);
    let program = python("browser.py", "python3-h2 and python3-httpx");
    let said = program.args([&sites.https.port().to_string(), DOMAIN]).arg(&sites.root).run().unwrap().ok();
    assert_eq!(said.stdout, "all as it should be\n", "{said}");
}
