//! The header of the PROXY protocol, version 2: tells an enclave who its client is. Written only; nothing here believes one.

use std::net::{IpAddr, SocketAddr};

/// What every header begins with.
const SIGNATURE: [u8; 12] = [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a];
/// Version 2, and that the connection is another's (`PROXY`), not of the sender's own making.
const VERSION_AND_COMMAND: u8 = 0x21;
/// TCP over IPv4 and over IPv6.
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// The header of a connection from there to there. IPv4 in its IPv6 form, as a socket for both families has it, is written
/// as IPv4.
pub(crate) fn v2(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut addresses = Vec::with_capacity(36);
    let family = match (source.ip().to_canonical(), destination.ip().to_canonical()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            addresses.extend_from_slice(&source.octets());
            addresses.extend_from_slice(&destination.octets());
            TCP4
        }
        (source, destination) => {
            for address in [source, destination] {
                let address = match address {
                    IpAddr::V4(address) => address.to_ipv6_mapped(),
                    IpAddr::V6(address) => address,
                };
                addresses.extend_from_slice(&address.octets());
            }
            TCP6
        }
    };
    addresses.extend_from_slice(&source.port().to_be_bytes());
    addresses.extend_from_slice(&destination.port().to_be_bytes());
    let length: u16 = if family == TCP4 { 12 } else { 36 };
    let mut header = SIGNATURE.to_vec();
    header.extend_from_slice(&[VERSION_AND_COMMAND, family]);
    header.extend_from_slice(&length.to_be_bytes());
    header.extend_from_slice(&addresses);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(source: &str, destination: &str) -> Vec<u8> {
        v2(source.parse().unwrap(), destination.parse().unwrap())
    }

    /// The layouts of section 2.2 of the specification.
    #[test]
    fn an_ipv4_header_has_the_bytes_of_the_specification() {
        let expected = [
            &b"\r\n\r\n\0\r\nQUIT\n"[..],
            &[0x21, 0x11, 0, 12],
            &[192, 0, 2, 1, 198, 51, 100, 7],
            &[0xd4, 0x31, 0x01, 0xbb],
        ];
        assert_eq!(header("192.0.2.1:54321", "198.51.100.7:443"), expected.concat());
        assert_eq!(header("[::ffff:192.0.2.1]:54321", "[::ffff:198.51.100.7]:443"), expected.concat());
    }

    #[test]
    fn an_ipv6_header_has_the_bytes_of_the_specification() {
        let expected = [
            &b"\r\n\r\n\0\r\nQUIT\n"[..],
            &[0x21, 0x21, 0, 36],
            &[0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            &[0x20, 0x01, 0x0d, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
            &[0x00, 0x50, 0x15, 0x38],
        ];
        assert_eq!(header("[2001:db8::1]:80", "[2001:db8:1::2]:5432"), expected.concat());
    }
}
