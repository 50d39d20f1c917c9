//! The lines for an enclave's /etc/hosts. Pure.

use enclaved_core::desired::EnclaveSpec;
use enclaved_core::id::EnclaveName;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// A line for every endpoint that has a loopback address; a comment for every other, so that none is missed.
pub(super) fn lines(name: &EnclaveName, spec: &EnclaveSpec) -> String {
    let mut lines: BTreeMap<(IpAddr, &str), Vec<String>> = BTreeMap::new();
    let mut others = Vec::new();
    for endpoint in &spec.egress {
        let host = endpoint.hostname.trim_end_matches('.');
        let wire = format!("{} -> vsock 3:{}", endpoint.port, endpoint.vsock_port);
        match endpoint.loopback {
            _ if host.parse::<IpAddr>().is_ok() => others.push(format!("{host} is an address ({wire})")),
            Some(address) => lines.entry((address, host)).or_default().push(wire),
            None => others.push(format!("{host} has no loopback address in the configuration ({wire})")),
        }
    }
    let mut text = format!("# endpoints of {name}, by enclaved\n");
    for ((address, host), wires) in lines {
        text.push_str(&format!("{address}\t{host}\t# port {}\n", wires.join(", ")));
    }
    for other in others {
        text.push_str(&format!("# {other}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{SourceFile, parse};

    #[test]
    fn every_endpoint_has_a_line_or_a_comment_and_names_come_once_for_each_address() {
        let text = r#"
            [[enclave]]
            name = "signer"
            image = "file:///x"
            cpus = 2
            memory_mib = 64
            egress = [
                { hostname = "kms.example.com.", vsock_port = 8000, loopback = "127.0.0.3" },
                { hostname = "db.example.com", port = 5432, vsock_port = 8001, loopback = "127.0.0.2" },
                { hostname = "db.example.com", port = 5433, vsock_port = 8002, loopback = "127.0.0.2" },
                { hostname = "10.0.0.1", vsock_port = 8003 },
                { hostname = "nowhere.example.com", vsock_port = 8004 },
            ]"#;
        let config = parse(&[SourceFile { path: "t".into(), text: text.into() }]).unwrap();
        let (name, spec) = config.desired.enclaves.first_key_value().unwrap();
        assert_eq!(
            lines(name, spec),
            "# endpoints of signer, by enclaved\n\
             127.0.0.2\tdb.example.com\t# port 5432 -> vsock 3:8001, 5433 -> vsock 3:8002\n\
             127.0.0.3\tkms.example.com\t# port 443 -> vsock 3:8000\n\
             # 10.0.0.1 is an address (443 -> vsock 3:8003)\n\
             # nowhere.example.com has no loopback address in the configuration (443 -> vsock 3:8004)\n"
        );
    }
}
