//! Which addresses an enclave may reach through its egress endpoints (invariant 6). Resolving names, and finding out the
//! host's own addresses, happens elsewhere.
//!
//! A name that an operator lists may resolve, by mistake or by an attacker's hand on DNS, to what the enclave must never
//! reach: services on the host's loopback, the metadata service with the instance role's credentials. So the address is
//! judged, every time, also in each form in which an IPv6 address carries an IPv4 address, because a translator on the way
//! may turn it into that.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why an address is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// 0.0.0.0/8 or `::`: the host itself, to connect(2).
    Unspecified,
    /// 127.0.0.0/8 or `::1`.
    Loopback,
    /// 169.254.0.0/16 or fe80::/10.
    LinkLocal,
    /// 224.0.0.0/4 or ff00::/8.
    Multicast,
    /// 240.0.0.0/4: reserved, and the broadcast address.
    Reserved,
    /// The instance or container metadata service, which hands out the host's credentials.
    Metadata,
    /// An address of this host.
    OwnAddress,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Unspecified => "an unspecified address",
            Self::Loopback => "a loopback address",
            Self::LinkLocal => "a link-local address",
            Self::Multicast => "a multicast address",
            Self::Reserved => "a reserved address",
            Self::Metadata => "the address of a metadata service",
            Self::OwnAddress => "an address of this host",
        })
    }
}

/// Addresses that this host takes for its own: one of an interface, or a whole range that is routed to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnRange {
    first: IpAddr,
    length: u8,
}

impl OwnRange {
    /// The addresses that share the first `length` bits with this one; all of its bits if it has fewer.
    pub fn new(address: IpAddr, length: u8) -> Self {
        Self { first: address, length }
    }

    /// Whether an address is among them, in this very form: see [`check`] for the others.
    pub fn contains(&self, address: IpAddr) -> bool {
        let mask = |length: u8| u128::MAX.checked_shl(128 - u32::from(length.min(128))).unwrap_or(0);
        match (self.first, address) {
            // Judged in the upper bits, so that one mask does for both.
            (IpAddr::V4(first), IpAddr::V4(address)) => {
                let differ = u128::from(first.to_bits() ^ address.to_bits()) << 96;
                differ & mask(self.length.min(32)) == 0
            }
            (IpAddr::V6(first), IpAddr::V6(address)) => (first.to_bits() ^ address.to_bits()) & mask(self.length) == 0,
            _ => false,
        }
    }
}

impl From<IpAddr> for OwnRange {
    fn from(address: IpAddr) -> Self {
        Self::new(address, 128)
    }
}

/// Judges one address of an endpoint.
///
/// `allowed` is the endpoint's own list: what the operator names there is served whatever it is. `own` is what this host
/// takes for its own.
pub fn check(address: IpAddr, allowed: &[IpAddr], own: &[OwnRange]) -> Result<(), Refusal> {
    let plain = address.to_canonical();
    if allowed.iter().any(|listed| listed.to_canonical() == plain) {
        return Ok(());
    }
    if is_own(plain, own) {
        return Err(Refusal::OwnAddress);
    }
    match plain {
        IpAddr::V4(v4) => check_v4(v4),
        IpAddr::V6(v6) => {
            check_v6(v6)?;
            for embedded in embedded_v4(v6) {
                check_v4(embedded)?;
                if is_own(embedded.into(), own) {
                    return Err(Refusal::OwnAddress);
                }
            }
            Ok(())
        }
    }
}

/// `address` is in its canonical form.
fn is_own(address: IpAddr, own: &[OwnRange]) -> bool {
    own.iter()
        .any(|own| own.contains(address) || OwnRange { first: own.first.to_canonical(), ..*own }.contains(address))
}

/// The metadata services of EC2 (169.254.169.254), ECS (169.254.170.2) and EKS Pod Identity (169.254.170.23).
const METADATA_V4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(169, 254, 169, 254), Ipv4Addr::new(169, 254, 170, 2), Ipv4Addr::new(169, 254, 170, 23)];

fn check_v4(address: Ipv4Addr) -> Result<(), Refusal> {
    let first = address.octets()[0];
    if METADATA_V4.contains(&address) {
        Err(Refusal::Metadata)
    } else if first == 0 {
        Err(Refusal::Unspecified)
    } else if address.is_loopback() {
        Err(Refusal::Loopback)
    } else if address.is_link_local() {
        Err(Refusal::LinkLocal)
    } else if address.is_multicast() {
        Err(Refusal::Multicast)
    } else if first >= 240 {
        Err(Refusal::Reserved)
    } else {
        Ok(())
    }
}

fn check_v6(address: Ipv6Addr) -> Result<(), Refusal> {
    let segments = address.segments();
    if segments[0] == 0xfd00 && segments[1] == 0x0ec2 {
        // EC2's services over IPv6, fd00:ec2::254 among them.
        Err(Refusal::Metadata)
    } else if address.is_unspecified() {
        Err(Refusal::Unspecified)
    } else if address.is_loopback() {
        Err(Refusal::Loopback)
    } else if address.is_unicast_link_local() {
        Err(Refusal::LinkLocal)
    } else if address.is_multicast() {
        Err(Refusal::Multicast)
    } else {
        Ok(())
    }
}

/// Every IPv4 address that a translator or tunnel may take this IPv6 address for.
fn embedded_v4(address: Ipv6Addr) -> impl Iterator<Item = Ipv4Addr> {
    let octets = address.octets();
    let segments = address.segments();
    let at = |first: usize| Ipv4Addr::new(octets[first], octets[first + 1], octets[first + 2], octets[first + 3]);
    let last = at(12);
    let nat64 = segments[0] == 0x64 && segments[1] == 0xff9b;
    let forms = [
        // ::a.b.c.d, IPv4-compatible (RFC 4291, 2.5.5.1); ::1 and :: were judged before.
        (segments[..6] == [0; 6]).then_some(last),
        // ::ffff:0:a.b.c.d, IPv4-translated (RFC 2765, 2.1)
        (segments[..6] == [0, 0, 0, 0, 0xffff, 0]).then_some(last),
        // 64:ff9b::a.b.c.d, NAT64's own prefix (RFC 6052, 2.1), and prefixes of local use under 64:ff9b:1::/48
        // (RFC 8215), whose length is unknown here: /96 and /64 and /56 and /48 are read.
        nat64.then_some(last),
        (nat64 && segments[2] == 1).then(|| Ipv4Addr::new(octets[6], octets[7], octets[9], octets[10])),
        (nat64 && segments[2] == 1).then(|| Ipv4Addr::new(octets[7], octets[9], octets[10], octets[11])),
        (nat64 && segments[2] == 1).then(|| at(9)),
        // 2002:a.b:c.d::, 6to4 (RFC 3056, 2)
        (segments[0] == 0x2002).then(|| at(2)),
        // 2001:0:<server>::<client, inverted>, Teredo (RFC 4380, 4)
        (segments[0] == 0x2001 && segments[1] == 0).then(|| at(4)),
        (segments[0] == 0x2001 && segments[1] == 0).then(|| Ipv4Addr::from_bits(!last.to_bits())),
        // <prefix>:0:5efe:a.b.c.d and <prefix>:200:5efe:a.b.c.d, ISATAP (RFC 5214, 6.1)
        (matches!(segments[4], 0 | 0x200) && segments[5] == 0x5efe).then_some(last),
    ];
    forms.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn verdict(address: &str) -> Result<(), Refusal> {
        let own = |text: &str, length| OwnRange::new(text.parse().unwrap(), length);
        let own = [own("10.0.0.5", 32), own("2001:db8::5", 128), own("10.9.0.0", 16), own("2001:db8:9::", 48)];
        check(address.parse().unwrap(), &[], &own)
    }

    #[test]
    fn every_range_that_is_not_an_upstream_is_refused_to_its_edges() {
        let cases = [
            ("0.0.0.0", Refusal::Unspecified),
            ("0.255.255.255", Refusal::Unspecified),
            ("127.0.0.0", Refusal::Loopback),
            ("127.255.255.255", Refusal::Loopback),
            ("169.254.0.0", Refusal::LinkLocal),
            ("169.254.255.255", Refusal::LinkLocal),
            ("169.254.169.254", Refusal::Metadata),
            ("169.254.170.2", Refusal::Metadata),
            ("169.254.170.23", Refusal::Metadata),
            ("224.0.0.0", Refusal::Multicast),
            ("239.255.255.255", Refusal::Multicast),
            ("240.0.0.0", Refusal::Reserved),
            ("255.255.255.255", Refusal::Reserved),
            ("10.0.0.5", Refusal::OwnAddress),
            ("10.9.0.0", Refusal::OwnAddress),
            ("10.9.255.255", Refusal::OwnAddress),
            ("::ffff:10.9.1.1", Refusal::OwnAddress),
            ("2001:db8:9:ffff::1", Refusal::OwnAddress),
            ("::", Refusal::Unspecified),
            ("::1", Refusal::Loopback),
            ("fe80::", Refusal::LinkLocal),
            ("febf:ffff::1", Refusal::LinkLocal),
            ("ff00::", Refusal::Multicast),
            ("ffff::1", Refusal::Multicast),
            ("fd00:ec2::254", Refusal::Metadata),
            ("fd00:ec2:ffff::1", Refusal::Metadata),
            ("2001:db8::5", Refusal::OwnAddress),
        ];
        for (address, refusal) in cases {
            assert_eq!(verdict(address), Err(refusal), "{address}");
        }
    }

    #[test]
    fn private_and_public_addresses_next_to_those_ranges_are_served() {
        for address in [
            "1.0.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "169.255.0.0",
            "223.255.255.255",
            "10.0.0.4",
            "10.8.255.255",
            "10.10.0.0",
            "2001:db8:8:ffff::1",
            "2001:db8:a::",
            "172.16.0.1",
            "192.168.0.1",
            "100.64.0.1",
            "52.94.0.1",
            "fec0::1",
            "fd00:ec1::254",
            "fd00:ec3::254",
            "2600:1f00::1",
            "2001:db8::6",
            "64:ff9b::52.94.0.1",
            "::ffff:52.94.0.1",
            "2002:345e:1::1",
        ] {
            assert_eq!(verdict(address), Ok(()), "{address}");
        }
    }

    /// Each form in which an IPv6 address can carry the given IPv4 address.
    fn forms(v4: Ipv4Addr) -> Vec<Ipv6Addr> {
        let [a, b, c, d] = v4.octets();
        let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
        let (high, low) = (pair(a, b), pair(c, d));
        let v6 = |segments: [u16; 8]| Ipv6Addr::from(segments);
        vec![
            v6([0, 0, 0, 0, 0, 0xffff, high, low]),
            v6([0, 0, 0, 0, 0, 0, high, low]),
            v6([0, 0, 0, 0, 0xffff, 0, high, low]),
            v6([0x64, 0xff9b, 0, 0, 0, 0, high, low]),
            v6([0x64, 0xff9b, 1, 0, 0, 0, high, low]),
            v6([0x64, 0xff9b, 1, high, pair(0, c), pair(d, 0), 0, 0]),
            v6([0x64, 0xff9b, 1, pair(0x12, a), pair(0, b), pair(c, d), 0, 0]),
            v6([0x64, 0xff9b, 1, 0x1234, pair(0, a), pair(b, c), pair(d, 0), 0]),
            v6([0x2002, high, low, 7, 0, 0, 0, 1]),
            v6([0x2001, 0, high, low, 0, 0, 0x3546, 0x3546]),
            v6([0x2001, 0, 0x345e, 1, 0, 0, !high, !low]),
            v6([0x2600, 0x1f00, 0, 1, 0, 0x5efe, high, low]),
            v6([0x2600, 0x1f00, 0, 1, 0x200, 0x5efe, high, low]),
        ]
    }

    proptest! {
        #[test]
        fn no_form_of_a_refused_ipv4_address_is_served(v4 in prop_oneof![
            Just(Ipv4Addr::new(169, 254, 169, 254)),
            Just(Ipv4Addr::new(10, 0, 0, 5)),
            any::<[u8; 2]>().prop_map(|[c, d]| Ipv4Addr::new(10, 9, c, d)),
            any::<[u8; 3]>().prop_map(|[b, c, d]| Ipv4Addr::new(127, b, c, d)),
            any::<[u8; 2]>().prop_map(|[c, d]| Ipv4Addr::new(169, 254, c, d)),
            (224..=255_u8, any::<[u8; 3]>()).prop_map(|(a, [b, c, d])| Ipv4Addr::new(a, b, c, d)),
        ]) {
            for form in forms(v4) {
                prop_assert!(verdict(&form.to_string()).is_err(), "{form} carries {v4} and is served");
            }
        }

        #[test]
        fn what_the_operator_lists_is_served_and_only_that(listed: IpAddr, other: IpAddr) {
            prop_assert_eq!(check(listed, &[listed], &[listed.into()]), Ok(()));
            prop_assume!(listed.to_canonical() != other.to_canonical());
            prop_assert_eq!(check(other, &[listed], &[]), check(other, &[], &[]));
        }
    }

    #[test]
    fn a_range_of_any_length_contains_its_own_and_no_more() {
        let range = |length| OwnRange::new("10.9.0.0".parse().unwrap(), length);
        let contains = |length, address: &str| range(length).contains(address.parse().unwrap());
        assert!(contains(0, "255.0.0.1") && contains(32, "10.9.0.0") && contains(255, "10.9.0.0"));
        assert!(!contains(32, "10.9.0.1") && contains(31, "10.9.0.1") && !contains(0, "::1"));
        let all = OwnRange::new("::".parse().unwrap(), 0);
        assert!(all.contains("ffff::1".parse().unwrap()) && !all.contains("1.2.3.4".parse().unwrap()));
    }

    #[test]
    fn listing_an_ipv4_address_covers_its_mapped_form() {
        let listed = ["127.0.0.1".parse().unwrap()];
        assert_eq!(check("::ffff:127.0.0.1".parse().unwrap(), &listed, &[]), Ok(()));
        assert_eq!(check("::ffff:127.0.0.2".parse().unwrap(), &listed, &[]), Err(Refusal::Loopback));
    }
}
