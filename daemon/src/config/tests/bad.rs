//! One case for each way of being wrong, with the exact words that people will read.

use super::{SIGNER, errors};

/// Pairs of a configuration and its errors.
fn check(cases: &[(&str, &str)]) {
    for (text, expected) in cases {
        assert_eq!(errors(text), *expected, "\n{text}");
    }
}

/// The same for what follows the smallest enclave, which has 5 lines.
fn check_enclave(cases: &[(&str, &str)]) {
    for (text, expected) in cases {
        assert_eq!(errors(&format!("{SIGNER}{text}")), *expected, "\n{text}");
    }
}

#[test]
fn what_is_not_toml_says_where() {
    check(&[
        ("x", "t.toml:1:2: not TOML: key with no value, expected `=`"),
        ("[host", "t.toml:1:6: not TOML: unclosed table, expected `]`"),
        (
            r"a = 1
a = 2",
            "t.toml:2:1: not TOML: duplicate key",
        ),
        (
            r"[host]
[host]",
            "t.toml:2:2: not TOML: duplicate key",
        ),
        (
            r#"name = "a
b""#,
            r#"t.toml:1:10: not TOML: invalid basic string, expected `"`
t.toml:2:2: not TOML: invalid unquoted key, expected letters, numbers, `-`, `_`
t.toml:2:3: not TOML: key with no value, expected `=`"#,
        ),
        ("x = 00", "t.toml:1:5: not TOML: unexpected leading zero, expected nothing"),
    ]);
}

#[test]
fn an_unknown_key_names_the_nearest_known_one_or_all_of_them() {
    check(&[
        ("hots = 1", r#"t.toml:1:1: unknown table or key "hots"; did you mean "host"?"#),
        ("[enclaves]", r#"t.toml:1:2: unknown table or key "enclaves"; did you mean "enclave"?"#),
        (
            r"[host]
reserve-cpus = 2",
            r#"t.toml:2:1: [host]: unknown key "reserve-cpus"; did you mean "reserve_cpus"?"#,
        ),
        (
            r"[host]
zzzzzzzzzzz = 2",
            r#"t.toml:2:1: [host]: unknown key "zzzzzzzzzzz"; known here: allocator, drain, image_cache_mib, on_stop, pool, proxy_socket, proxy_state_dir, reserve_cpus, reserve_memory_mib, run_dir, state_dir, supervisor, sysfs"#,
        ),
        (
            r#"[host]
allocater = "verify"
reserve_memory = 1"#,
            r#"t.toml:2:1: [host]: unknown key "allocater"; did you mean "allocator"?
t.toml:3:1: [host]: unknown key "reserve_memory"; did you mean "reserve_memory_mib"?"#,
        ),
        (
            r#"[vsock]
transport = { hybird = "/x" }"#,
            r#"t.toml:2:13: [vsock] transport: the key "hybrid" is missing: a string
t.toml:2:15: [vsock] transport: unknown key "hybird"; did you mean "hybrid"?"#,
        ),
    ]);
}

#[test]
fn an_unknown_key_in_an_enclave_names_the_enclave() {
    check_enclave(&[
        ("memroy_mib = 3", r#"t.toml:6:1: [[enclave]] "signer": unknown key "memroy_mib"; did you mean "memory_mib"?"#),
        (
            r#"[[enclave.egress]]
hostname = "a"
vsock_port = 1
host = 1"#,
            r#"t.toml:9:1: [[enclave]] "signer" egress[0]: unknown key "host"; did you mean "hostname"?"#,
        ),
        (
            r"[enclave.ingress]
ports = [{ lisen = 1, vsock_port = 1 }]",
            r#"t.toml:7:10: [[enclave]] "signer" ingress.ports[0]: the key "listen" is missing: an integer from 1 to 65535 or a string, such as "[::]:443"
t.toml:7:12: [[enclave]] "signer" ingress.ports[0]: unknown key "lisen"; did you mean "listen"?"#,
        ),
    ]);
}

#[test]
fn a_missing_key_says_what_belongs_there() {
    check(&[
        (
            "[[enclave]]",
            r#"t.toml:1:1: [[enclave]] number 1: the key "cpus" is missing: an integer from 1 to 1024
t.toml:1:1: [[enclave]] number 1: the key "image" is missing: a string, such as "s3://bucket/signer.eif"
t.toml:1:1: [[enclave]] number 1: the key "memory_mib" is missing: an integer from 64 to 16777216
t.toml:1:1: [[enclave]] number 1: the key "name" is missing: a string"#,
        ),
        (
            "[control_plane]",
            r#"t.toml:1:1: [control_plane]: the key "url" is missing: a string, such as "https://control.example.com""#,
        ),
        (
            r"[vsock]
transport = {}",
            r#"t.toml:2:13: [vsock] transport: the key "hybrid" is missing: a string"#,
        ),
    ]);
}

#[test]
fn a_missing_key_in_an_enclave_says_what_belongs_there() {
    check_enclave(&[
        (
            "[[enclave.egress]]",
            r#"t.toml:6:1: [[enclave]] "signer" egress[0]: the key "hostname" is missing: a string, such as "kms.us-east-1.amazonaws.com"
t.toml:6:1: [[enclave]] "signer" egress[0]: the key "vsock_port" is missing: an integer from 1 to 4294967294"#,
        ),
        (
            "[enclave.health]",
            r#"t.toml:6:1: [[enclave]] "signer" health: what to check is missing: http = { port = 8080, path = "/health" } or connect = { port = 8080 }"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a.b"]"#,
            r#"t.toml:6:1: [[enclave]] "signer" ingress: http_port is missing: the vsock port inside the enclave that answers HTTP for these domains"#,
        ),
    ]);
}

#[test]
fn a_wrong_type_says_what_is_allowed() {
    check(&[
        (
            "host = 1",
            "t.toml:1:8: [host]: is 1; allowed: a table with allocator, drain, image_cache_mib, on_stop, pool, proxy_socket, proxy_state_dir, reserve_cpus, reserve_memory_mib, run_dir, state_dir, supervisor, sysfs",
        ),
        (
            r#"[enclave]
name = "x""#,
            "t.toml:1:1: [enclave]: is a table; allowed: an array of tables, each under its own [[enclave]]",
        ),
        (
            "enclave = [1]",
            "t.toml:1:12: [[enclave]] number 1: is 1; allowed: a table with cpus, debug_mode, egress, health, hosts_port, image, image_poll, ingress, measurements, memory_mib, name, require_signature, restart, update",
        ),
        (
            r#"[host]
reserve_cpus = "2""#,
            r#"t.toml:2:16: [host] reserve_cpus: is "2"; allowed: an integer from 1 to 1024"#,
        ),
        (
            r"[host]
reserve_cpus = 2.5",
            "t.toml:2:16: [host] reserve_cpus: is a floating-point number; allowed: an integer from 1 to 1024",
        ),
        (
            r"[host]
reserve_cpus = [2]",
            "t.toml:2:16: [host] reserve_cpus: is an array; allowed: an integer from 1 to 1024",
        ),
        (
            r"[host]
sysfs = 2026-01-01",
            "t.toml:2:9: [host] sysfs: is a date or time; allowed: a string",
        ),
        (
            r"[host]
drain = 30",
            r#"t.toml:2:9: [host] drain: is 30; allowed: a string, such as "30s""#,
        ),
        (
            r"[host]
drain = true",
            r#"t.toml:2:9: [host] drain: is true; allowed: a string, such as "30s""#,
        ),
        (
            r"[ingress]
listen = 443",
            r#"t.toml:2:10: [ingress] listen: is 443; allowed: a string, such as "[::]:443""#,
        ),
    ]);
}

#[test]
fn a_wrong_type_in_an_enclave_says_what_is_allowed() {
    check_enclave(&[
        (
            r"[enclave.measurements]
pcr8 = 1",
            r#"t.toml:7:8: [[enclave]] "signer" measurements.pcr8: is 1; allowed: a string"#,
        ),
        (
            r"[enclave.health]
http = 80",
            r#"t.toml:7:8: [[enclave]] "signer" health.http: is 80; allowed: a table with path, port"#,
        ),
        (
            r#"[enclave.egress]
hostname = "a""#,
            r#"t.toml:6:1: [[enclave]] "signer" egress: is a table; allowed: an array of tables, each under its own [[enclave.egress]]"#,
        ),
        (
            r#"[enclave.ingress]
ports = ["80"]"#,
            r#"t.toml:7:10: [[enclave]] "signer" ingress.ports[0]: is "80"; allowed: an integer from 1 to 65535 or a table with allow, idle_timeout, listen, max_connections, max_connections_per_source, max_lifetime, proxy_protocol, vsock_port"#,
        ),
    ]);
}

#[test]
fn a_number_out_of_range_says_which_are_allowed() {
    check(&[
        (
            r"[host]
reserve_cpus = 0",
            "t.toml:2:16: [host] reserve_cpus: is 0; allowed: an integer from 1 to 1024",
        ),
        (
            r"[host]
reserve_cpus = -1",
            "t.toml:2:16: [host] reserve_cpus: is -1; allowed: an integer from 1 to 1024",
        ),
        (
            r"[host]
reserve_cpus = 99999999999999999999",
            "t.toml:2:16: [host] reserve_cpus: does not fit into 64 bits; allowed: an integer from 1 to 1024",
        ),
        (
            r#"[[enclave]]
name = "a"
image = "file:///x"
cpus = 0
memory_mib = 63"#,
            r#"t.toml:4:8: [[enclave]] "a" cpus: is 0; allowed: an integer from 1 to 1024
t.toml:5:14: [[enclave]] "a" memory_mib: is 63; allowed: an integer from 64 to 16777216"#,
        ),
    ]);
}

#[test]
fn a_port_out_of_range_says_which_are_allowed() {
    check_enclave(&[
        (
            r"[enclave.health]
connect = { port = 0 }",
            r#"t.toml:7:20: [[enclave]] "signer" health.connect.port: is 0; allowed: an integer from 1 to 4294967294"#,
        ),
        (
            r"[enclave.health]
connect = { port = 1 }
failures = 0",
            r#"t.toml:8:12: [[enclave]] "signer" health.failures: is 0; allowed: an integer from 1 to 100"#,
        ),
        (
            r#"[[enclave.egress]]
hostname = "b"
vsock_port = 4294967295
port = 0"#,
            r#"t.toml:8:14: [[enclave]] "signer" egress[0].vsock_port: is 4294967295; allowed: an integer from 1 to 4294967294
t.toml:9:8: [[enclave]] "signer" egress[0].port: is 0; allowed: an integer from 1 to 65535"#,
        ),
        (
            r"[enclave.ingress]
ports = [0]",
            r#"t.toml:7:10: [[enclave]] "signer" ingress.ports[0]: is 0; allowed: an integer from 1 to 65535 or a table with allow, idle_timeout, listen, max_connections, max_connections_per_source, max_lifetime, proxy_protocol, vsock_port"#,
        ),
        (
            r"[enclave.ingress]
ports = [{ listen = 70000, vsock_port = 0 }]",
            r#"t.toml:7:21: [[enclave]] "signer" ingress.ports[0].listen: is 70000; allowed: an integer from 1 to 65535 or a string, such as "[::]:443"
t.toml:7:41: [[enclave]] "signer" ingress.ports[0].vsock_port: is 0; allowed: an integer from 1 to 4294967294"#,
        ),
        (
            r"[enclave.ingress]
http_port = 0",
            r#"t.toml:7:13: [[enclave]] "signer" ingress.http_port: is 0; allowed: an integer from 1 to 4294967294"#,
        ),
    ]);
}

#[test]
fn a_word_that_is_none_of_the_allowed_ones_names_them() {
    check(&[
        (
            r#"[host]
on_stop = "kepe""#,
            r#"t.toml:2:11: [host] on_stop: is "kepe"; allowed: "keep" or "terminate"; did you mean "keep"?"#,
        ),
        (
            r#"[host]
supervisor = "systemd "
"#,
            r#"t.toml:2:14: [host] supervisor: is "systemd "; allowed: "systemd" or "direct"; did you mean "systemd"?"#,
        ),
        (
            r#"[host]
run_dir = "/run/x""#,
            r#"t.toml:2:11: [host] run_dir: must be /run/enclaved with supervisor = "systemd", the default: the units look for launches there"#,
        ),
        (
            r#"[host]
proxy_socket = "link.sock""#,
            "t.toml:2:16: [host] proxy_socket: is \"link.sock\"; allowed: an absolute path",
        ),
        (
            r#"[vsock]
transport = "hybrid""#,
            r#"t.toml:2:13: [vsock] transport: is "hybrid"; allowed: "af_vsock" or a table with hybrid"#,
        ),
    ]);
}

#[test]
fn times_have_a_unit_and_a_range() {
    check(&[
        (
            r#"[host]
drain = "30""#,
            r#"t.toml:2:9: [host] drain: is "30"; allowed: a time with its unit, from 0s to 1h"#,
        ),
        (
            r#"[host]
drain = "2h""#,
            r#"t.toml:2:9: [host] drain: is "2h"; allowed: a time with its unit, from 0s to 1h"#,
        ),
        (
            r#"[control_plane]
url = "https://a.b"
interval = "0s""#,
            r#"t.toml:3:12: [control_plane] interval: is "0s"; allowed: a time with its unit, from 1s to 1h"#,
        ),
    ]);
}

#[test]
fn all_that_is_wrong_with_a_health_check_comes_at_once() {
    check_enclave(&[
        (
            r#"[enclave.health]
http = { port = 1, path = "x" }
interval = "1ms"
timeout = "2m"
start_period = "-1s""#,
            r#"t.toml:7:27: [[enclave]] "signer" health.http.path: is "x"; allowed: a path, with or without a query, that begins with / and is visible ASCII
t.toml:8:12: [[enclave]] "signer" health.interval: is "1ms"; allowed: a time with its unit, from 100ms to 1h
t.toml:9:11: [[enclave]] "signer" health.timeout: is "2m"; allowed: a time with its unit, from 100ms to 1m
t.toml:10:16: [[enclave]] "signer" health.start_period: is "-1s"; allowed: a time with its unit, from 0s to 1h"#,
        ),
        (
            r"[enclave.health]
http = { port = 1 }
connect = { port = 1 }",
            r#"t.toml:8:11: [[enclave]] "signer" health.connect: there is http too; only one of the two is allowed"#,
        ),
        (
            r#"[enclave.health]
http = { port = 1, path = "/a b" }"#,
            r#"t.toml:7:27: [[enclave]] "signer" health.http.path: is "/a b"; allowed: a path, with or without a query, that begins with / and is visible ASCII"#,
        ),
    ]);
}

#[test]
fn paths_are_absolute_distinct_and_short_enough_for_sockets() {
    check(&[
        (
            r#"[host]
state_dir = "x""#,
            r#"t.toml:2:13: [host] state_dir: is "x"; allowed: an absolute path"#,
        ),
        (
            r#"[host]
state_dir = "/run/enclaved""#,
            "t.toml:2:13: [host] state_dir: is the same directory as run_dir; each needs its own",
        ),
        (
            r#"[host]
supervisor = "direct"
run_dir = "/rrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrr""#,
            "t.toml:3:11: [host] run_dir: is 81 bytes long; at most 80 are allowed, because the path of a Unix socket in it may have 108",
        ),
        (
            r#"[nitro]
cli = "./nitro-cli""#,
            r#"t.toml:2:7: [nitro] cli: is "./nitro-cli"; allowed: a program's name, to be found in PATH, or an absolute path"#,
        ),
        (
            r#"[nitro]
cli = """#,
            r#"t.toml:2:7: [nitro] cli: is ""; allowed: a program's name, to be found in PATH, or an absolute path"#,
        ),
        (
            r#"[vsock]
transport = { hybrid = "x" }"#,
            r#"t.toml:2:24: [vsock] transport.hybrid: is "x"; allowed: an absolute path"#,
        ),
    ]);
}

#[test]
fn addresses_have_an_ip_address_and_a_port() {
    check(&[
        (
            r#"[ingress]
listen = "443""#,
            r#"t.toml:2:10: [ingress] listen: is "443"; allowed: an IP address and a port, as "127.0.0.1:9119" or "[::]:443""#,
        ),
        (
            r#"[metrics]
listen = "localhost:1""#,
            r#"t.toml:2:10: [metrics] listen: is "localhost:1"; allowed: an IP address and a port, as "127.0.0.1:9119" or "[::]:443""#,
        ),
    ]);
}

#[test]
fn the_control_plane_is_reached_by_https() {
    check(&[
        (
            r#"[control_plane]
url = "x""#,
            r#"t.toml:2:7: [control_plane] url: is "x"; allowed: https://host[:port][/path], or http:// to a loopback address"#,
        ),
        (
            r#"[control_plane]
url = "http://a.b""#,
            r#"t.toml:2:7: [control_plane] url: is "http://a.b": http:// is allowed to a loopback address only; use https://"#,
        ),
        (
            r#"[control_plane]
url = "https://u:p@a.b""#,
            "t.toml:2:7: [control_plane] url: holds a user name or password; URLs are shown in logs, so neither is allowed",
        ),
        (
            r#"[control_plane]
url = "ftp://a.b""#,
            r#"t.toml:2:7: [control_plane] url: is "ftp://a.b"; allowed: https://host[:port][/path], or http:// to a loopback address"#,
        ),
        (
            r#"[control_plane]
url = "https://a.b/?q""#,
            "t.toml:2:7: [control_plane] url: has a query; allowed: https://host[:port][/path], or http:// to a loopback address",
        ),
        (
            r#"[control_plane]
url = "https://""#,
            r#"t.toml:2:7: [control_plane] url: is "https://", which is not a URL; allowed: https://host[:port][/path], or http:// to a loopback address"#,
        ),
    ]);
}

#[test]
fn sets_of_measurements_hold_values_and_each_is_given_once() {
    let pcr = "ab".repeat(48);
    let set = format!("[[enclave.measurements]]\npcr0 = \"{pcr}\"\n");
    let same = format!("[[enclave.measurements]]\npcr0 = \"{}\"\n", pcr.to_uppercase());
    let empty = "[[enclave.measurements]]\n";
    let nothing =
        "holds no value, so any image would be allowed: pin what `enclavectl measure FILE` prints, or remove it";
    for (text, expected) in [
        ("[enclave.measurements]".to_owned(), format!(r#"t.toml:6:1: [[enclave]] "signer" measurements: {nothing}"#)),
        ("measurements = {}".to_owned(), format!(r#"t.toml:6:16: [[enclave]] "signer" measurements: {nothing}"#)),
        (
            "measurements = []".to_owned(),
            r#"t.toml:6:16: [[enclave]] "signer" measurements: is empty: give one set of values at least, or remove it"#
                .to_owned(),
        ),
        (
            format!("{set}{empty}"),
            format!(r#"t.toml:8:1: [[enclave]] "signer" measurements[1]: {nothing}"#),
        ),
        (
            format!("{set}{same}"),
            r#"t.toml:8:1: [[enclave]] "signer" measurements[1]: is the same set as the one at t.toml:6:1: remove one of the two"#
                .to_owned(),
        ),
        (
            format!("{set}[[enclave.measurements]]\npcr7 = \"\"\n"),
            r#"t.toml:8:1: [[enclave]] "signer" measurements[1]: holds no value, so any image would be allowed: pin what `enclavectl measure FILE` prints, or remove it
t.toml:9:1: [[enclave]] "signer" measurements[1]: unknown key "pcr7"; did you mean "pcr0"?"#
                .to_owned(),
        ),
        (
            set.repeat(9),
            r#"t.toml:22:1: [[enclave]] "signer" measurements[8]: is one too many: there are 9, at most 8 are allowed"#
                .to_owned(),
        ),
        (
            "measurements = 1".to_owned(),
            r#"t.toml:6:16: [[enclave]] "signer" measurements: is 1; allowed: an array, each item a table with pcr0, pcr1, pcr2, pcr8, sha256 or a table with pcr0, pcr1, pcr2, pcr8, sha256"#
                .to_owned(),
        ),
        (
            "require_signature = 1".to_owned(),
            r#"t.toml:6:21: [[enclave]] "signer" require_signature: is 1; allowed: true or false"#.to_owned(),
        ),
    ] {
        assert_eq!(errors(&format!("{SIGNER}{text}")), expected, "{text}");
    }
}

#[test]
fn measurements_are_hexadecimal_and_not_those_of_debug_mode() {
    check_enclave(&[
        (
            r#"[enclave.measurements]
pcr0 = "abc"
sha256 = "0""#,
            r#"t.toml:7:8: [[enclave]] "signer" measurements.pcr0: not a PCR: 96 hexadecimal digits (SHA-384)
t.toml:8:10: [[enclave]] "signer" measurements.sha256: not a SHA-256: 64 hexadecimal digits"#,
        ),
        (
            r#"[enclave.measurements]
pcr0 = "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000""#,
            r#"t.toml:7:8: [[enclave]] "signer" measurements.pcr0: is zero, which is what an enclave in debug mode attests, never what an image measures: take the value from `enclavectl measure FILE`"#,
        ),
    ]);
}

#[test]
fn an_enclave_has_a_name_and_an_image() {
    check(&[(
        r#"[[enclave]]
name = "A"
image = "ftp://x"
cpus = 1
memory_mib = 64"#,
        r#"t.toml:2:8: [[enclave]] "A" name: "A" is not an enclave name: 1 to 32 characters of a-z, 0-9 and -, beginning and ending with a letter or digit
t.toml:3:9: [[enclave]] "A" image: "ftp://x" is not an image address: its scheme is unknown; allowed are s3://bucket/key[?versionId=version], https://host/path and file:///absolute/path"#,
    )]);
}

#[test]
fn two_enclaves_do_not_share_a_name() {
    check_enclave(&[(
        r#"[[enclave]]
name = "signer"
image = "file:///x.eif"
cpus = 2
memory_mib = 64
"#,
        r#"t.toml:7:8: [[enclave]] "signer" name: another enclave has this name, at t.toml:2:8"#,
    )]);
}

#[test]
fn endpoints_have_a_host_and_a_vsock_port_of_their_own() {
    check_enclave(&[
        (
            r#"[[enclave.egress]]
hostname = "192.0.2.1"
vsock_port = 1
sni = true
max_connections = 0"#,
            r#"t.toml:10:19: [[enclave]] "signer" egress[0].max_connections: is 0; allowed: an integer from 1 to 65536"#,
        ),
        (
            r#"[[enclave.egress]]
hostname = "192.0.2.1"
vsock_port = 1
connect_timeout = "5m"
idle_timeout = "0s""#,
            "t.toml:9:19: [[enclave]] \"signer\" egress[0].connect_timeout: is \"5m\"; allowed: a time with its unit, from 100ms to 2m\n\
             t.toml:10:16: [[enclave]] \"signer\" egress[0].idle_timeout: is \"0s\"; allowed: a time with its unit, from 1s to 30days",
        ),
        (
            r#"[[enclave.egress]]
hostname = "192.0.2.1"
vsock_port = 1
sni = true"#,
            r#"t.toml:9:7: [[enclave]] "signer" egress[0].sni: needs a name, and hostname is the address 192.0.2.1"#,
        ),
        (
            r#"hosts_port = 7000
[[enclave.egress]]
hostname = "a"
vsock_port = 7000"#,
            r#"t.toml:9:14: [[enclave]] "signer" egress[0].vsock_port: the list of endpoints has vsock port 7000, at t.toml:6:14"#,
        ),
        (
            "hosts_port = 9000",
            r#"t.toml:6:14: [[enclave]] "signer" hosts_port: is 9000, on which nitro-cli waits for the enclave's first sign of life; take another"#,
        ),
        (
            r#"[enclave.ingress]
ports = [{ listen = 1, vsock_port = 1, allow = ["10.1.0.0/8", "x"] }]"#,
            r#"t.toml:7:49: [[enclave]] "signer" ingress.ports[0].allow[0]: is "10.1.0.0/8"; the address has bits outside the prefix; the network is 10.0.0.0/8
t.toml:7:63: [[enclave]] "signer" ingress.ports[0].allow[1]: is "x"; allowed: an IP address, or a network such as 10.0.0.0/8 or 2001:db8::/32"#,
        ),
        (
            r#"[[enclave.egress]]
hostname = "https://a"
vsock_port = 9000"#,
            r#"t.toml:7:12: [[enclave]] "signer" egress[0].hostname: is "https://a"; allowed: a DNS name or an IP address
t.toml:8:14: [[enclave]] "signer" egress[0].vsock_port: is 9000, on which nitro-cli waits for the enclave's first sign of life; take another"#,
        ),
        (
            r#"[[enclave.egress]]
hostname = "a"
vsock_port = 1
[[enclave.egress]]
hostname = "b"
vsock_port = 1"#,
            r#"t.toml:11:14: [[enclave]] "signer" egress[1].vsock_port: another endpoint of this enclave has vsock port 1, at t.toml:8:14"#,
        ),
        (
            r#"[[enclave.egress]]
hostname = "a"
vsock_port = 1
loopback = "10.0.0.1"
allow_addresses = ["x"]"#,
            r#"t.toml:9:12: [[enclave]] "signer" egress[0].loopback: is 10.0.0.1; allowed: an address in 127.0.0.0/8, or ::1
t.toml:10:20: [[enclave]] "signer" egress[0].allow_addresses[0]: is "x"; allowed: an IP address"#,
        ),
        (
            r#"[[enclave.egress]]
hostname = "a"
vsock_port = 1
loopback = "127.0.0.2"
[[enclave.egress]]
hostname = "b"
vsock_port = 2
loopback = "127.0.0.2""#,
            r#"t.toml:13:12: [[enclave]] "signer" egress[1].loopback: another endpoint of this enclave has 127.0.0.2:443 too, at t.toml:9:12: give each its own address"#,
        ),
    ]);
}

#[test]
fn an_address_that_the_egress_policy_refuses_must_be_listed() {
    check_enclave(&[(
        "[[enclave.egress]]\nhostname = \"169.254.169.254\"\nvsock_port = 1",
        r#"t.toml:7:12: [[enclave]] "signer" egress[0].hostname: 169.254.169.254 is the address of a metadata service, which is refused unless it is listed: allow_addresses = ["169.254.169.254"]"#,
    )]);
    let listed = "hostname = \"127.0.0.1\"\nvsock_port = 1\nallow_addresses = [\"127.0.0.1\"]";
    super::good(&format!("{SIGNER}[[enclave.egress]]\n{listed}"));
}

#[test]
fn domains_are_names_and_listed_once() {
    check_enclave(&[
        (
            r#"[enclave.ingress]
domains = ["a b", "x.y", "X.y"]
http_port = 80"#,
            r#"t.toml:7:12: [[enclave]] "signer" ingress.domains[0]: is "a b"; allowed: a name as "api.example.com" or "*.example.com", without scheme and port
t.toml:7:26: [[enclave]] "signer" ingress.domains[2]: the domain x.y is listed already, at t.toml:7:19"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["x.y"]
http_port = 80
[[enclave]]
name = "b"
image = "file:///x.eif"
cpus = 2
memory_mib = 64
[enclave.ingress]
domains = ["x.y"]
http_port = 80"#,
            r#"t.toml:15:12: [[enclave]] "b" ingress.domains[0]: the domain x.y is listed already, at t.toml:7:12"#,
        ),
    ]);
}

#[test]
fn paths_need_domains_and_one_port_each() {
    check_enclave(&[
        (
            r#"[enclave.ingress]
http_port = 80
caution = true
e2e = true
routes = [{ path = "/x", vsock_port = 1 }]"#,
            r#"t.toml:7:13: [[enclave]] "signer" ingress.http_port: is of use with domains only: add domains = ["..."], or remove it
t.toml:8:11: [[enclave]] "signer" ingress.caution: is of use with domains only: add domains = ["..."], or remove it
t.toml:9:7: [[enclave]] "signer" ingress.e2e: is of use with domains only: add domains = ["..."], or remove it
t.toml:10:10: [[enclave]] "signer" ingress.routes: is of use with domains only: add domains = ["..."], or remove it"#,
        ),
        (
            r"[enclave.ingress]
default = true
passthrough = true",
            r#"t.toml:7:11: [[enclave]] "signer" ingress.default: is of use with domains only: add domains = ["..."], or remove it
t.toml:8:15: [[enclave]] "signer" ingress.passthrough: is of use with domains only: add domains = ["..."], or remove it"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a.b"]
passthrough = true
http_port = 80
e2e = true"#,
            r#"t.toml:9:13: [[enclave]] "signer" ingress.http_port: cannot be with passthrough: what is not decrypted has neither paths, headers nor a certificate here; remove one of the two
t.toml:10:7: [[enclave]] "signer" ingress.e2e: cannot be with passthrough: what is not decrypted has neither paths, headers nor a certificate here; remove one of the two"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a.b"]
http_port = 80
tls_port = 443
proxy_protocol = "v2""#,
            r#"t.toml:9:12: [[enclave]] "signer" ingress.tls_port: is of use with passthrough = true only: add it, or remove this
t.toml:10:18: [[enclave]] "signer" ingress.proxy_protocol: is of use with passthrough = true only: add it, or remove this"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a.b"]
http_port = 80
default = true
[[enclave]]
name = "other"
image = "file:///x.eif"
cpus = 2
memory_mib = 64
[enclave.ingress]
domains = ["c.d"]
http_port = 80
default = true"#,
            r#"t.toml:18:11: [[enclave]] "other" ingress.default: another enclave takes unknown names already, at t.toml:9:11"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a.b"]
http_port = 80
certificate = { cert = "crt", key = "/key" }
hsts = "3y"
routes = [{ path = "/x", vsock_port = 81, upstream = "http2" }]"#,
            r#"t.toml:11:54: [[enclave]] "signer" ingress.routes[0].upstream: is "http2"; allowed: "http1" or "h2c"; did you mean "http1"?"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a.b"]
http_port = 80
certificate = { cert = "crt", key = "/key" }
client_ca = "clients.pem"
hsts = "3y""#,
            r#"t.toml:9:24: [[enclave]] "signer" ingress.certificate.cert: is "crt"; allowed: an absolute path
t.toml:10:13: [[enclave]] "signer" ingress.client_ca: is "clients.pem"; allowed: an absolute path
t.toml:11:8: [[enclave]] "signer" ingress.hsts: is "3y"; allowed: a time with its unit, from 0s to 2years 1day 12h"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a.b"]
http_port = 80
[ingress]
redirect = "[::]:443""#,
            r#"t.toml:10:12: [ingress] redirect: [::]:443 is taken by [ingress] listen (by default)"#,
        ),
        (
            r#"[ingress]
trusted_proxies = ["10.0.0.1", "10.0.0.1/8"]
max_connections = 0"#,
            r#"t.toml:8:19: [ingress] max_connections: is 0; allowed: an integer from 1 to 65536"#,
        ),
        (
            r#"[ingress]
trusted_proxies = ["10.0.0.1", "10.0.0.1/8"]"#,
            r#"t.toml:7:32: [ingress] trusted_proxies[1]: is "10.0.0.1/8"; the address has bits outside the prefix; the network is 10.0.0.0/8"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a"]
http_port = 80
caution = true
routes = [{ path = "/attestation/", vsock_port = 1 }, { path = "x", vsock_port = 1 }]"#,
            r#"t.toml:9:11: [[enclave]] "signer" ingress.caution: the path /attestation has a port already, at t.toml:10:20
t.toml:10:64: [[enclave]] "signer" ingress.routes[1].path: is "x"; allowed: a path that begins with / and is visible ASCII without ? and #"#,
        ),
    ]);
}

#[test]
fn what_gets_around_earlier_end_to_end_encryption_is_refused() {
    check_enclave(&[
        (
            r#"[enclave.ingress]
domains = ["a.b"]
http_port = 8083
e2e = "earlier"
routes = [{ path = "/", vsock_port = 80 }, { path = "/x", vsock_port = 8083 }]"#,
            r#"t.toml:8:13: [[enclave]] "signer" ingress.http_port: gets around the encryption: with e2e = "earlier" every path goes to vsock port 8080, where STEVE passes it on to the application on 8083; remove http_port, or change e2e
t.toml:10:20: [[enclave]] "signer" ingress.routes[0].path: gets around the encryption: with e2e = "earlier" every path goes to vsock port 8080, where STEVE passes it on to the application on 8083; remove this route, or change e2e
t.toml:10:72: [[enclave]] "signer" ingress.routes[1].vsock_port: gets around the encryption: with e2e = "earlier" every path goes to vsock port 8080, where STEVE passes it on to the application on 8083; remove this route, or give the service a port of its own, or change e2e"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a.b"]
caution = true
e2e = "earlier""#,
            r#"t.toml:8:11: [[enclave]] "signer" ingress.caution: is of the current release and e2e of the earlier one; an image is of one release: write the same for both, or the ports of this image in routes"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a.b"]
http_port = 1
caution = "earlyer"
e2e = 8080"#,
            r#"t.toml:9:11: [[enclave]] "signer" ingress.caution: is "earlyer"; allowed: true or false or "current" or "earlier"; did you mean "earlier"?
t.toml:10:7: [[enclave]] "signer" ingress.e2e: is 8080; allowed: true or false or "current" or "earlier""#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a.b"]
passthrough = true
e2e = "earlier""#,
            r#"t.toml:9:7: [[enclave]] "signer" ingress.e2e: cannot be with passthrough: what is not decrypted has neither paths, headers nor a certificate here; remove one of the two"#,
        ),
    ]);
}

#[test]
fn an_access_log_goes_to_stdout_or_to_an_absolute_path() {
    check(&[
        (
            "[ingress]\naccess_log = \"access.log\"",
            r#"t.toml:2:14: [ingress] access_log: is "access.log"; allowed: the absolute path of a file, or "stdout", which is the journal under systemd"#,
        ),
        (
            "[ingress]\naccess_log = \"journal\"",
            r#"t.toml:2:14: [ingress] access_log: is "journal"; allowed: the absolute path of a file, or "stdout", which is the journal under systemd"#,
        ),
        (
            "[ingress]\naccess_log = \"/dev/stdout\"",
            r#"t.toml:2:14: [ingress] access_log: is "/dev/stdout"; allowed: the absolute path of a file, or "stdout", which is the journal under systemd"#,
        ),
        (
            "[ingress]\naccess_log = true",
            r#"t.toml:2:14: [ingress] access_log: is true; allowed: a string, such as "/var/log/enclaved-proxy/access.log""#,
        ),
    ]);
}

#[test]
fn a_port_of_the_host_is_taken_once() {
    check_enclave(&[
        (
            r"[enclave.ingress]
ports = [9119]",
            r#"t.toml:7:10: [[enclave]] "signer" ingress.ports[0]: [::]:9119 is taken by [metrics] listen (by default)"#,
        ),
        (
            r#"[enclave.ingress]
domains = ["a"]
http_port = 1
ports = [443]"#,
            r#"t.toml:9:10: [[enclave]] "signer" ingress.ports[0]: [::]:443 is taken by [ingress] listen (by default)"#,
        ),
        (
            r"[enclave.ingress]
ports = [1, 1]",
            r#"t.toml:7:13: [[enclave]] "signer" ingress.ports[1]: [::]:1 is taken by [[enclave]] "signer" ingress.ports[0] (t.toml:7:10)"#,
        ),
        (
            r#"[enclave.ingress]
ports = [{ listen = "x", vsock_port = 1 }]"#,
            r#"t.toml:7:21: [[enclave]] "signer" ingress.ports[0].listen: is "x"; allowed: an IP address and a port, as "127.0.0.1:9119" or "[::]:443""#,
        ),
    ]);
}

#[test]
fn a_fifth_enclave_is_one_too_many() {
    let five: String = (1..=5).map(|number| SIGNER.replace("signer", &format!("e{number}"))).collect();
    assert_eq!(errors(&five), "t.toml:21:1: [[enclave]] \"e5\": is one too many: there are 5, at most 4 are allowed");
}

#[test]
fn an_overlong_text_is_cut_in_messages() {
    let error = errors(&format!("{} = 1", "x".repeat(100_000)));
    assert!(error.len() < 300, "{error}");
}

/// An unknown key does not hide what else is wrong.
#[test]
fn unknown_keys_and_wrong_meanings_come_together() {
    check(&[(
        "[host]\ndrian = \"1s\"\n[metrics]\nlisten = \"x\"",
        "t.toml:2:1: [host]: unknown key \"drian\"; did you mean \"drain\"?\n\
         t.toml:4:10: [metrics] listen: is \"x\"; allowed: an IP address and a port, as \"127.0.0.1:9119\" or \"[::]:443\"",
    )]);
}
