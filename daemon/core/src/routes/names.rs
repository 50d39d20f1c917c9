//! Which texts are names of hosts and domains: one rule for the configuration and for the proxy.

use std::net::IpAddr;

/// Longest DNS name, in bytes without the final dot (RFC 1035, 2.3.4).
const NAME_BYTES: usize = 253;
/// Longest label of a DNS name, in bytes.
const LABEL_BYTES: usize = 63;

/// Whether it is a DNS name in either case (a final dot is welcome: it keeps the resolver's search list out), or an IP
/// address.
pub fn is_host(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok() || is_name(text.strip_suffix('.').unwrap_or(text))
}

/// Whether it is a lower-case DNS name without final dot, with `*.` before it or not, or an IP address.
pub fn is_domain(text: &str) -> bool {
    let name = text.strip_prefix("*.").unwrap_or(text);
    text.parse::<IpAddr>().is_ok() || (is_name(name) && !text.bytes().any(|byte| byte.is_ascii_uppercase()))
}

fn is_name(text: &str) -> bool {
    let byte_ok = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let label_ok = |label: &str| {
        (1..=LABEL_BYTES).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(byte_ok)
    };
    // "10.0.0" and "300.1.1.1" are mistyped addresses, which resolvers read in ways of their own.
    let number = text.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    text.len() <= NAME_BYTES && text.split('.').all(label_ok) && !number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_dns_names_and_ip_addresses() {
        for good in ["a", "localhost", "kms.us-east-1.amazonaws.com", "db.internal.", "_x.y", "10.0.0.1", "::1", "1a.b"]
        {
            assert!(is_host(good), "{good}");
        }
        let long = format!("{}.com", "a.".repeat(130));
        for bad in
            ["", ".", "a..b", "-a.b", "a-.b", "a b", "a:1", "[::1]", "10.0.0", "300.1.1.1", "*.a", "ä.de", "a/b", &long]
        {
            assert!(!is_host(bad), "{bad}");
        }
    }

    #[test]
    fn domains_may_have_one_wildcard_in_front() {
        for good in ["example.com", "*.example.com", "localhost", "127.0.0.1"] {
            assert!(is_domain(good), "{good}");
        }
        for bad in
            ["*", "*.", "*.*.a", "a.*.b", "example.com.", "example.com:443", "https://example.com", "Example.com"]
        {
            assert!(!is_domain(bad), "{bad}");
        }
    }
}
