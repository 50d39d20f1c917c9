//! What happens to headers between client and enclave. Pure.
//!
//! What describes one connection stays on it; what says who the client is comes from here alone, never from the client.

use super::client_ca::ClientCertificate;
use super::sites::host_of;
use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING,
    UPGRADE,
};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
pub(crate) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub(crate) const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_CLIENT_CERT_SUBJECT: HeaderName = HeaderName::from_static("x-client-cert-subject");
const X_CLIENT_CERT_SHA256: HeaderName = HeaderName::from_static("x-client-cert-sha256");
/// Names a request in log lines on both sides.
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Headers in which only a proxy tells about the client or its request; and all that begin with `x-forwarded-`.
const FORWARDED: [&str; 18] = [
    "cf-connecting-ip",
    "client-ip",
    "forwarded",
    "forwarded-for",
    "front-end-https",
    "x-forwarded",
    "x-scheme",
    "x-url-scheme",
    "x-client-cert-sha256",
    "x-client-cert-subject",
    "x-real-ip",
    "x-request-id",
    "x-client-ip",
    "x-cluster-client-ip",
    "true-client-ip",
    "x-original-host",
    "x-original-url",
    "x-rewrite-url",
];

/// Headers by which applications read a request, and which are set or removed here.
const DECIDED: [&str; 10] = [
    "connection",
    "content-length",
    "expect",
    "http2-settings",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What is told about the client.
#[derive(Debug)]
pub(crate) struct Client<'a> {
    /// Its address.
    pub(crate) address: &'a HeaderValue,
    /// Whether it is a proxy whose word about its own client is taken.
    pub(crate) trusted: bool,
    /// Its certificate, where the site demands one.
    pub(crate) certificate: Option<&'a ClientCertificate>,
    /// The authority it asked for.
    pub(crate) host: HeaderValue,
    /// The request's name.
    pub(crate) request_id: HeaderValue,
}

/// The protocol that a request asks to change to, if it is one that is passed on: exactly one (WebSocket, mostly), and
/// not another version of HTTP or TLS. A change to `h2c` would be a tunnel through which a client makes requests without
/// any of what is decided here.
pub(crate) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    if !connection_options(headers).any(|option| option.eq_ignore_ascii_case("upgrade")) {
        return None;
    }
    let mut offers = headers.get_all(UPGRADE).iter();
    let offer = offers.next().filter(|_| offers.next().is_none())?;
    let protocol = offer.to_str().ok()?.to_ascii_lowercase();
    let one = !protocol.is_empty() && !protocol.contains([',', ' ', '\t']);
    let web = ["h2", "http", "tls"].iter().any(|prefix| protocol.starts_with(prefix));
    if one && !web { Some(offer.clone()) } else { None }
}

/// Whether an answer changes to the protocol that was asked for.
pub(crate) fn changes_to(answer: &HeaderMap, asked: &HeaderValue) -> bool {
    let mut answers = answer.get_all(UPGRADE).iter();
    let same = answers.next().is_some_and(|answer| answer.as_bytes().eq_ignore_ascii_case(asked.as_bytes()));
    same && answers.next().is_none()
}

/// Takes out of a request's trailers what would not have passed among its headers: applications that merge the two would
/// take it for true.
pub(crate) fn trailers_to_enclave(trailers: &mut HeaderMap) {
    remove_hop_by_hop(trailers);
    remove_forwarded(trailers);
    for name in [HOST, CONTENT_LENGTH, COOKIE, EXPECT] {
        trailers.remove(name);
    }
}

/// Turns a client's headers into those that the enclave gets. `upgrade` is passed on if it is given.
pub(crate) fn to_enclave(headers: &mut HeaderMap, client: Client<'_>, upgrade: Option<HeaderValue>) {
    let trailers = headers
        .get_all(TE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.split(',').any(|coding| coding.trim().eq_ignore_ascii_case("trailers")));
    remove_hop_by_hop(headers);
    // The body's framing is told by its own length, so that no two statements about it can differ.
    headers.remove(CONTENT_LENGTH);
    // The body is read at once, so the client was told to continue already.
    headers.remove(EXPECT);
    let forwarded = if client.trusted { Forwarded::of(headers) } else { Forwarded::default() };
    remove_forwarded(headers);
    join_cookies(headers);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    if let Some(protocol) = upgrade {
        headers.insert(UPGRADE, protocol);
        headers.insert(CONNECTION, HeaderValue::from_static(if trailers { "te, upgrade" } else { "upgrade" }));
    }
    headers.insert(X_FORWARDED_FOR, forwarded.chain(client.address));
    headers.insert(X_FORWARDED_PROTO, forwarded.proto.unwrap_or(HeaderValue::from_static("https")));
    headers.insert(X_FORWARDED_HOST, forwarded.host.unwrap_or_else(|| client.host.clone()));
    headers.insert(HOST, client.host);
    headers.insert(X_REQUEST_ID, client.request_id);
    if let Some(certificate) = client.certificate {
        headers.insert(X_CLIENT_CERT_SHA256, certificate.sha256.clone());
        if let Some(subject) = certificate.subject.clone() {
            headers.insert(X_CLIENT_CERT_SUBJECT, subject);
        }
    }
}

/// What a proxy in front of this one says of its client.
#[derive(Debug, Default)]
struct Forwarded {
    /// Every address that it names, in order.
    addresses: Vec<u8>,
    proto: Option<HeaderValue>,
    host: Option<HeaderValue>,
}

impl Forwarded {
    fn of(headers: &HeaderMap) -> Self {
        let addresses: Vec<_> = headers.get_all(X_FORWARDED_FOR).iter().map(HeaderValue::as_bytes).collect();
        // Said twice, it says nothing.
        let one = |name: HeaderName| {
            let mut values = headers.get_all(name).iter();
            values.next().filter(|_| values.next().is_none()).cloned()
        };
        let known = |proto: &HeaderValue| ["https", "http"].iter().any(|known| proto.as_bytes() == known.as_bytes());
        let proto = one(X_FORWARDED_PROTO).filter(known);
        let host = one(X_FORWARDED_HOST).filter(|host| host.to_str().ok().and_then(host_of).is_some());
        Self { addresses: addresses.join(&b", "[..]), proto, host }
    }

    /// Those addresses, and that of the one who named them.
    fn chain(&self, address: &HeaderValue) -> HeaderValue {
        if self.addresses.is_empty() {
            return address.clone();
        }
        let chain = [&self.addresses[..], b", ", address.as_bytes()].concat();
        HeaderValue::from_bytes(&chain).unwrap_or_else(|_| address.clone())
    }
}

/// Takes out what HTTP/2 says otherwise, or not at all.
pub(crate) fn to_http2(headers: &mut HeaderMap) {
    headers.remove(CONNECTION);
    headers.remove(HOST);
}

/// Turns an enclave's headers into those that the client gets.
pub(crate) fn to_client(headers: &mut HeaderMap, upgrade: Option<HeaderValue>) {
    remove_hop_by_hop(headers);
    if let Some(protocol) = upgrade {
        headers.insert(UPGRADE, protocol);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
}

/// RFC 9110, 7.6.1: what `Connection` names, and what is known to be of this kind.
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<_> =
            connection_options(headers).filter_map(|option| HeaderName::from_bytes(option.as_bytes()).ok()).collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    for name in [KEEP_ALIVE, PROXY_CONNECTION, TE, TRANSFER_ENCODING, UPGRADE, HTTP2_SETTINGS] {
        headers.remove(name);
    }
}

fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|option| !option.is_empty())
}

/// Also with `_` in place of `-`, which many an application's framework takes for the same. So is what else is decided here.
fn remove_forwarded(headers: &mut HeaderMap) {
    let forwarded = |name: &str| name.starts_with("x-forwarded-") || FORWARDED.contains(&name);
    let remove = |name: &&HeaderName| {
        let name = name.as_str();
        if name.contains('_') {
            let plain = name.replace('_', "-");
            forwarded(&plain) || DECIDED.contains(&plain.as_str())
        } else {
            forwarded(name)
        }
    };
    // None, mostly: no allocation then.
    let removed: Vec<_> = headers.keys().filter(remove).cloned().collect();
    for name in removed {
        headers.remove(name);
    }
}

/// HTTP/2 may send a cookie header in pieces; HTTP/1.1 has one (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let pieces: Vec<_> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if pieces.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&pieces.join(&b"; "[..]))
    {
        headers.insert(COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    fn sent(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        sent_by(false, pairs)
    }

    fn sent_by(trusted: bool, pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_static(value));
        }
        let upgrade = upgrade(&map);
        let client = Client {
            address: &HeaderValue::from_static("192.0.2.1"),
            trusted,
            certificate: None,
            host: HeaderValue::from_static("a.test:8443"),
            request_id: HeaderValue::from_static("r-1"),
        };
        to_enclave(&mut map, client, upgrade);
        map
    }

    fn told() -> Vec<(&'static str, &'static str)> {
        vec![
            ("host", "a.test:8443"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "a.test:8443"),
            ("x-request-id", "r-1"),
        ]
    }

    #[test]
    fn who_the_client_is_comes_from_the_proxy_alone() {
        let received = sent(&[
            ("host", "evil.test"),
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-for", "10.0.0.2"),
            ("x_forwarded_for", "10.0.0.3"),
            ("x-forwarded_proto", "http"),
            ("forwarded", "for=10.0.0.4"),
            ("x-real-ip", "10.0.0.5"),
            ("x-forwarded-prefix", "/admin"),
            ("x_forwarded_ssl", "on"),
            ("x-client-ip", "10.0.0.6"),
            ("x-client-cert-subject", "CN=admin"),
            ("x_client_cert_sha256", "00"),
            ("x-original-url", "/admin"),
            ("x-request-id", "forged"),
            ("connection", "x-forwarded-for, host, x-forwarded-proto"),
        ]);
        assert_eq!(received, headers(&told()));
    }

    #[test]
    fn what_a_trusted_proxy_says_of_its_client_is_passed_on_with_its_own_address() {
        let told = |pairs: &[(&'static str, &'static str)]| {
            let received = sent_by(true, pairs);
            let told = ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "host"];
            told.map(|name| received.get(name).unwrap().to_str().unwrap().to_owned())
        };
        let said = [
            ("x-forwarded-for", "198.51.100.1, 10.0.0.1"),
            ("x-forwarded-for", "10.0.0.2"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "b.test"),
            ("x-real-ip", "10.0.0.5"),
        ];
        assert_eq!(told(&said), ["198.51.100.1, 10.0.0.1, 10.0.0.2, 192.0.2.1", "http", "b.test", "a.test:8443"]);
        assert!(sent_by(true, &said).get("x-real-ip").is_none(), "who the client is, is told in one way");
        let unclear = [("x-forwarded-proto", "gopher"), ("x-forwarded-host", "b.test"), ("x-forwarded-host", "c.test")];
        assert_eq!(told(&unclear), ["192.0.2.1", "https", "a.test:8443", "a.test:8443"]);
        assert_eq!(told(&[("x-forwarded-host", "b/c")])[2], "a.test:8443");
    }

    #[test]
    fn what_is_decided_here_has_no_second_name() {
        let received = sent(&[("content_length", "50"), ("transfer_encoding", "chunked"), ("api_key", "1")]);
        let mut expected = told();
        expected.push(("api_key", "1"));
        assert_eq!(received, headers(&expected));
    }

    #[test]
    fn a_change_to_http2_is_not_passed_on() {
        for offer in ["h2c", "H2C", "websocket, h2c", "h2c, websocket", "HTTP/2.0", "TLS/1.3", ""] {
            let received =
                sent(&[("connection", "upgrade"), ("upgrade", offer), ("http2-settings", "AAMAAABkAAQAAP__")]);
            assert_eq!(received, headers(&told()), "{offer}");
        }
        let received = sent(&[("connection", "Upgrade"), ("upgrade", "WebSocket")]);
        let mut expected = told();
        expected.extend([("upgrade", "WebSocket"), ("connection", "upgrade")]);
        assert_eq!(received, headers(&expected));
    }

    #[test]
    fn an_answer_may_change_only_to_what_was_asked_for() {
        let asked = HeaderValue::from_static("WebSocket");
        assert!(changes_to(&headers(&[("upgrade", "websocket")]), &asked));
        assert!(!changes_to(&headers(&[("upgrade", "h2c")]), &asked));
        assert!(!changes_to(&HeaderMap::new(), &asked));
    }

    #[test]
    fn trailers_say_nothing_that_headers_may_not() {
        let mut trailers = headers(&[
            ("x-forwarded-for", "127.0.0.1"),
            ("x_real_ip", "127.0.0.1"),
            ("host", "evil.test"),
            ("connection", "x"),
            ("grpc-status", "0"),
        ]);
        trailers_to_enclave(&mut trailers);
        assert_eq!(trailers, headers(&[("grpc-status", "0")]));
    }

    #[test]
    fn what_concerns_one_connection_stays_on_it() {
        let received = sent(&[
            ("connection", "keep-alive, X-Hop"),
            ("connection", "x-hop-too"),
            ("x-hop", "1"),
            ("x-hop-too", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("content-length", "5"),
            ("upgrade", "h2c"),
            ("expect", "100-continue"),
            ("te", "gzip"),
            ("accept", "*/*"),
            ("authorization", "Bearer x"),
        ]);
        let mut expected = told();
        expected.extend([("accept", "*/*"), ("authorization", "Bearer x")]);
        assert_eq!(received, headers(&expected));
        let mut answer = headers(&[("connection", "close, x-hop"), ("x-hop", "1"), ("content-length", "5")]);
        to_client(&mut answer, None);
        assert_eq!(answer, headers(&[("content-length", "5")]));
    }

    #[test]
    fn upgrades_and_trailers_pass_where_they_are_asked_for() {
        let received = sent(&[("connection", "Upgrade"), ("upgrade", "websocket"), ("te", "trailers, deflate")]);
        assert_eq!(received.get("upgrade").unwrap(), "websocket");
        assert_eq!(received.get("te").unwrap(), "trailers");
        assert_eq!(received.get("connection").unwrap(), "te, upgrade");
    }

    #[test]
    fn pieces_of_a_cookie_become_one_header() {
        let received = sent(&[("cookie", "a=1"), ("cookie", "b=2; c=3")]);
        assert_eq!(received.get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2; c=3"]);
    }
}
