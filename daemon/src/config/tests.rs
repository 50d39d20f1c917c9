//! What configurations come to: good ones, and every way of being wrong with its exact words.

use super::*;
use enclaved_core::desired::{AllocatorMode, Probe, UpdatePolicy};
use enclaved_core::id::{Cid, MemoryMib, Pcr};
use enclaved_core::image::{ExpectedImage, Pins};
use enclaved_core::ledger::Ledger;
use enclaved_core::routes::{
    Ages, EgressLimits, EgressRoute, Passthrough, ProxyProtocol, Routes, SiteRules, UpstreamHttp, VsockTransport,
};
use proptest::prelude::*;

mod bad;
mod files;

/// The smallest enclave.
const SIGNER: &str = "[[enclave]]\nname = \"signer\"\nimage = \"file:///x.eif\"\ncpus = 2\nmemory_mib = 64\n";

fn source(path: &str, text: impl Into<String>) -> SourceFile {
    SourceFile { path: path.into(), text: text.into() }
}

fn parsed(text: &str) -> Result<Config, ConfigErrors> {
    parse(&[source("t.toml", text)])
}

fn good(text: &str) -> Config {
    parsed(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// The errors of a single file, one a line.
fn errors(text: &str) -> String {
    parsed(text).expect_err(text).to_string()
}

const EXAMPLE: &str = include_str!("../../../config/enclaved.toml");

/// The example with everything in it switched on.
fn whole_example() -> String {
    let switched_on = EXAMPLE.lines().map(|line| match line.strip_prefix('#') {
        Some(setting) if setting.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => setting,
        _ => line,
    });
    switched_on.collect::<Vec<_>>().join("\n")
}

#[test]
fn an_empty_file_is_a_host_without_enclaves_and_has_the_documented_defaults() {
    let config = good("");
    assert_eq!(config.desired, Desired::default());
    assert_eq!(config.host.admin_socket(), Path::new("/run/enclaved/admin.sock"));
    assert_eq!(config.metrics.listen, "127.0.0.1:9119".parse().unwrap());
    assert_eq!(config.nitro_cli, Path::new("nitro-cli"));
    assert_eq!(config.control_plane, None);
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn a_host_is_systemds_and_its_pool_enclaveds_unless_something_else_is_said() {
    for (text, supervisor, allocator) in [
        ("", SupervisorKind::Systemd, AllocatorMode::Manage),
        ("[host]\nsupervisor = \"direct\"", SupervisorKind::Direct, AllocatorMode::Verify),
        ("[host]\nsupervisor = \"direct\"\nallocator = \"manage\"", SupervisorKind::Direct, AllocatorMode::Manage),
        ("[host]\nallocator = \"external\"", SupervisorKind::Systemd, AllocatorMode::External),
    ] {
        let config = good(text);
        assert_eq!((config.host.supervisor, config.desired.host.allocator), (supervisor, allocator), "{text}");
    }
}

#[test]
fn the_example_is_good_as_it_is_installed() {
    assert_eq!(good(EXAMPLE).desired, Desired::default());
}

#[test]
fn the_example_is_good_with_everything_switched_on() {
    let config = good(&whole_example());
    assert_eq!(config.warnings.len(), 1, "the second enclave has no measurements: {:?}", config.warnings);
    let signer = &config.desired.enclaves[&"signer".parse().unwrap()];
    assert_eq!(signer.memory, MemoryMib(1024));
    assert_eq!(signer.update, UpdatePolicy::Auto);
    assert_eq!(signer.image.source.to_string(), "s3://caution-abc-images/signer.eif");
    assert_eq!(signer.health.as_ref().unwrap().probe, Probe::Http { port: 8082, path: "/health".into() });
    assert_eq!(signer.egress[0].port, 443);
    assert!(signer.egress[0].sni && !signer.egress[1].sni);
    let limits = EgressLimits {
        max_connections: Some(4096),
        connections_per_second: Some(1000),
        connect_timeout_ms: Some(10_000),
        ages: Ages { idle_s: Some(24 * 3600), lifetime_s: Some(7 * 24 * 3600) },
    };
    assert_eq!((signer.egress[0].limits, signer.egress[1].limits), (limits, EgressLimits::default()));
    assert_eq!(signer.hosts_port, Some(7000));
    let rules = &signer.ingress.tcp[1].rules;
    assert_eq!((rules.proxy_protocol, rules.max_connections_per_source), (Some(ProxyProtocol::V2), Some(100)));
    assert_eq!(rules.ages, Ages { idle_s: Some(3600), lifetime_s: Some(7 * 24 * 3600) });
    assert!(rules.allows("10.1.2.3".parse().unwrap()) && !rules.allows("192.0.2.1".parse().unwrap()));
    assert_eq!(signer.egress[1].allow_addresses, ["127.0.0.1".parse::<std::net::IpAddr>().unwrap()]);
    let paths: Vec<_> = signer.ingress.paths.iter().map(|path| (path.prefix.as_str(), path.vsock_port)).collect();
    assert_eq!(paths, [("/", 8083), ("/admin", 8084), ("/attestation", 49502), ("/e2p", 49500)]);
    let tcp: Vec<_> = signer.ingress.tcp.iter().map(|port| (port.listen.to_string(), port.vsock_port)).collect();
    assert_eq!(tcp, [("[::]:9100".to_owned(), 9100), ("[::]:5432".to_owned(), 15432)]);
    let https = config.desired.https.unwrap();
    assert_eq!(https.listen, "[::]:443".parse().unwrap());
    assert_eq!(https.rules.redirect, Some("[::]:80".parse().unwrap()));
    assert!(https.rules.trusts("10.1.2.3".parse().unwrap()) && !https.rules.trusts("192.0.2.1".parse().unwrap()));
    assert_eq!(config.desired.access_log, "/var/log/enclaved-proxy/access.log".parse().ok());
    assert_eq!(config.control_plane.unwrap().url, "https://control.example.com");
    let ledger = &config.desired.enclaves[&"ledger".parse().unwrap()];
    let raw = Passthrough { vsock_port: 443, proxy_protocol: Some(ProxyProtocol::V2) };
    assert_eq!(ledger.ingress.site, SiteRules { default: true, passthrough: Some(raw), ..SiteRules::default() });
    let site = &signer.ingress.site;
    assert_eq!(site.certificate.as_ref().unwrap().key, Path::new("/etc/enclaved-proxy/api.key"));
    assert_eq!(site.client_ca.as_deref(), Some(Path::new("/etc/enclaved-proxy/clients.pem")));
    assert_eq!((site.hsts_seconds, signer.ingress.paths[1].upstream), (Some(31_536_000), UpstreamHttp::H2c));
    assert_eq!(ledger.health.as_ref().unwrap().probe, Probe::Connect { port: 9100 });
}

/// The example of the README, with a measurement in the place of its ellipsis.
#[test]
fn the_readmes_configuration_is_good() {
    let readme = include_str!("../../../README.md");
    let (_, rest) = readme.split_once("```toml\n").unwrap();
    let (text, _) = rest.split_once("```").unwrap();
    let config = good(&text.replace('…', &"ab".repeat(48)));
    assert_eq!(config.warnings, Vec::<String>::new());
    assert!(config.desired.https.is_some());
}

/// Every key below `schema`, as the instances of it that `values` holds.
fn walk(
    root: &serde_json::Value,
    schema: &serde_json::Value,
    values: &[&serde_json::Value],
    path: &str,
    seen: &mut u32,
) {
    let target = schema.get("$ref").and_then(|target| target.as_str()).map(|target| &target[1..]);
    let schema = target.map_or(schema, |target| root.pointer(target).unwrap());
    for variant in ["anyOf", "oneOf"].iter().filter_map(|key| schema.get(*key)?.as_array()).flatten() {
        let fitting: Vec<_> = values.iter().copied().filter(|value| value.is_object()).collect();
        if variant.get("properties").is_none() && variant.get("$ref").is_none() || fitting.is_empty() {
            continue;
        }
        walk(root, variant, &fitting, path, seen);
    }
    if let Some(items) = schema.get("items") {
        let items_of: Vec<_> = values.iter().filter_map(|value| value.as_array()).flatten().collect();
        walk(root, items, &items_of, path, seen);
    }
    for (key, property) in schema.get("properties").and_then(|keys| keys.as_object()).into_iter().flatten() {
        let path = format!("{path}.{key}");
        let found: Vec<_> = values.iter().filter_map(|value| value.get(key)).collect();
        assert!(!found.is_empty(), "config/enclaved.toml does not show {path}");
        *seen += 1;
        let of_the_host = !path.starts_with(".enclave.");
        if let Some(default) = property.get("default").filter(|default| of_the_host && !default.is_array()) {
            assert_eq!(found, [default], "config/enclaved.toml shows another default of {path}");
        }
        walk(root, property, &found, &path, seen);
    }
}

#[test]
fn the_example_shows_every_key_and_for_the_host_its_default() {
    let values: serde_json::Value = toml::from_str(&whole_example()).unwrap();
    let schema = schema();
    let mut seen = 0;
    walk(&schema, &schema, &[&values], "", &mut seen);
    assert!(seen > 50, "{seen} keys");
}

#[test]
fn every_key_of_the_schema_is_described() {
    fn check(schema: &serde_json::Value) {
        for (key, property) in schema.get("properties").and_then(|keys| keys.as_object()).into_iter().flatten() {
            assert!(property.get("description").is_some(), "{key} has no description");
        }
    }
    let schema = schema();
    check(&schema);
    schema["$defs"].as_object().unwrap().values().for_each(check);
}

/// `structure` understands a part of JSON schema only: this is that part.
#[test]
fn the_schema_uses_only_what_the_checker_understands() {
    const UNDERSTOOD: [&str; 16] = [
        "$ref",
        "anyOf",
        "oneOf",
        "const",
        "enum",
        "type",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "minimum",
        "maximum",
        "maxItems",
        "examples",
        "description",
        "default",
    ];
    // Left to `meaning` on purpose.
    const NOT_ENFORCED: [&str; 3] = ["pattern", "format", "title"];
    fn check(schema: &serde_json::Value) {
        let Some(object) = schema.as_object() else { return };
        for (key, value) in object {
            assert!(UNDERSTOOD.contains(&key.as_str()) || NOT_ENFORCED.contains(&key.as_str()), "{key}");
            match key.as_str() {
                "properties" => value.as_object().unwrap().values().for_each(check),
                "anyOf" | "oneOf" => value.as_array().unwrap().iter().for_each(check),
                "items" => check(value),
                "type" => assert!(value.is_string(), "{value}"),
                "additionalProperties" => assert_eq!(value, false),
                _ => {}
            }
        }
    }
    let mut schema = schema();
    for definition in schema["$defs"].as_object().unwrap().values() {
        check(definition);
    }
    let root = schema.as_object_mut().unwrap();
    root.remove("$defs");
    root.remove("$schema");
    check(&schema);
}

#[test]
fn the_schema_in_the_tree_is_the_one_that_is_enforced() {
    let in_tree: serde_json::Value =
        serde_json::from_str(include_str!("../../../config/enclaved.schema.json")).unwrap();
    let refresh = "cargo run --bin enclavectl -- schema config > config/enclaved.schema.json";
    assert!(in_tree == schema(), "config/enclaved.schema.json is out of date; refresh it with\n    {refresh}");
}

#[test]
fn the_hybrid_transport_names_its_folder() {
    let config = good("[vsock]\ntransport = { hybrid = \"/tmp/v\" }");
    assert_eq!(config.desired.vsock, VsockTransport::Hybrid("/tmp/v".into()));
}

#[test]
fn https_is_served_only_if_an_enclave_has_domains() {
    assert_eq!(good(SIGNER).desired.https, None);
    let with = format!("{SIGNER}[enclave.ingress]\ndomains = [\"LocalHost\"]\nhttp_port = 1\n");
    let config = good(&with);
    assert!(config.desired.https.is_some());
    assert_eq!(config.desired.enclaves.values().next().unwrap().ingress.domains, ["localhost"]);
}

#[test]
fn cautions_services_are_where_the_images_release_has_them() {
    let paths = |keys: &str| {
        let config = good(&format!("{SIGNER}[enclave.ingress]\ndomains = [\"a.b\"]\n{keys}"));
        let ingress = &config.desired.enclaves.values().next().unwrap().ingress;
        ingress.paths.iter().map(|path| (path.prefix.clone(), path.vsock_port)).collect::<Vec<_>>()
    };
    let expect = |keys: &str, expected: &[(&str, u32)]| {
        let expected: Vec<_> = expected.iter().map(|(prefix, port)| ((*prefix).to_owned(), *port)).collect();
        assert_eq!(paths(keys), expected, "{keys}");
    };
    let current = [("/", 8083), ("/attestation", 49502), ("/e2p", 49500)];
    expect("http_port = 8083\ncaution = true\ne2e = true", &current);
    expect("http_port = 8083\ncaution = \"current\"\ne2e = true", &current);
    expect("http_port = 8083\ncaution = false\ne2e = false", &current[..1]);
    expect("caution = \"earlier\"\ne2e = \"earlier\"", &[("/attestation", 8082), ("/", 8080)]);
    expect("e2e = \"earlier\"", &[("/", 8080)]);
    expect("http_port = 8083\ncaution = \"earlier\"", &[("/", 8083), ("/attestation", 8082)]);
}

#[test]
fn a_raw_port_of_the_application_behind_earlier_end_to_end_encryption_is_a_warning() {
    let warnings = |e2e: &str| {
        let keys =
            format!("domains = [\"a.b\"]\nroutes = [{{ path = \"/y\", vsock_port = 80 }}]\nports = [8083]\n{e2e}");
        good(&format!("{SIGNER}[enclave.ingress]\n{keys}")).warnings.join("\n")
    };
    let said = warnings("e2e = \"earlier\"");
    assert!(said.contains("ingress.ports[0]: gets around the encryption"), "{said}");
    assert!(!warnings("e2e = true\nhttp_port = 8083").contains("gets around"));
}

#[test]
fn an_access_log_that_the_proxys_unit_cannot_write_is_a_warning_where_there_is_that_unit() {
    let warnings = |host: &str, to: &str| good(&format!("{host}\n[ingress]\naccess_log = \"{to}\"")).warnings;
    for fine in ["stdout", "/var/log/enclaved-proxy/a.log", "/dev/null"] {
        assert_eq!(warnings("", fine), Vec::<String>::new(), "{fine}");
    }
    assert_eq!(warnings("[host]\nsupervisor = \"direct\"", "/tmp/a.log"), Vec::<String>::new());
    let said = warnings("", "/var/log/nginx/a.log").join("\n");
    assert!(said.contains("t.toml:3:14") && said.contains("ReadWritePaths="), "{said}");
}

#[test]
fn a_route_for_everything_stands_in_for_the_http_port() {
    good(&format!("{SIGNER}[enclave.ingress]\ndomains = [\"a.b\"]\nroutes = [{{ path = \"/\", vsock_port = 80 }}]\n"));
}

#[test]
fn a_local_control_plane_may_be_without_tls() {
    for url in ["http://localhost:1/x", "http://127.0.0.9", "http://[::1]:8080", "https://a.example/b"] {
        assert_eq!(good(&format!("[control_plane]\nurl = \"{url}\"")).control_plane.unwrap().url, url);
    }
}

#[test]
fn listeners_share_a_port_only_on_different_addresses() {
    let two = |one: &str, other: &str| {
        parsed(&format!(
            "{SIGNER}[enclave.ingress]\nports = [{{ listen = {one}, vsock_port = 1 }}, {{ listen = {other}, vsock_port = 2 }}]"
        ))
    };
    for (one, other) in [
        ("\"127.0.0.1:1\"", "\"127.0.0.2:1\""),
        ("\"127.0.0.1:1\"", "\"[::1]:1\""),
        ("\"0.0.0.0:1\"", "\"[::1]:1\""),
        ("1", "2"),
        ("\"127.0.0.1:0\"", "\"127.0.0.2:0\""),
    ] {
        assert!(two(one, other).is_ok(), "{one} {other}");
    }
    for (one, other) in [
        ("1", "1"),
        ("1", "\"127.0.0.1:1\""),
        ("\"[::1]:1\"", "1"),
        ("\"0.0.0.0:1\"", "\"127.0.0.1:1\""),
        ("\"[::ffff:127.0.0.1]:1\"", "\"127.0.0.1:1\""),
        ("\"127.0.0.1:0\"", "\"127.0.0.1:0\""),
    ] {
        assert!(two(one, other).is_err(), "{one} {other}");
    }
}

#[test]
fn the_revision_follows_the_contents_and_not_the_place() {
    let revision = |path: &str, text: &str| parse(&[source(path, text)]).unwrap().revision;
    assert_eq!(revision("a", "[host]"), revision("b", "[host]"));
    assert_ne!(revision("a", "[host]"), revision("a", "[host]\n"));
    assert_eq!(revision("a", "").len(), 12);
    let split = parse(&[source("a", ""), source("b", "[host]")]).unwrap().revision;
    assert_ne!(split, revision("a", "[host]"));
}

#[test]
fn what_is_unwise_is_a_warning_with_its_place() {
    let pinned = format!("{SIGNER}[enclave.measurements]\npcr0 = \"{}\"", "ab".repeat(48));
    assert_eq!(good(&pinned).warnings, Vec::<String>::new());
    let warnings = good(SIGNER).warnings;
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].starts_with("t.toml:1:1: [[enclave]] \"signer\": no measurement is pinned"), "{warnings:?}");
    let warnings =
        good(&format!("{SIGNER}debug_mode = true\n[enclave.measurements]\npcr0 = \"{}\"", "ab".repeat(48))).warnings;
    assert!(
        warnings[0].starts_with("t.toml:6:14: [[enclave]] \"signer\" debug_mode: the enclave runs in debug"),
        "{warnings:?}"
    );
}

#[test]
fn measurements_are_one_table_or_several_and_a_signature_can_be_required() {
    let [one, other] = [1, 2].map(|byte| Pins { pcr0: Some(Pcr([byte; 48])), ..Pins::default() });
    let (first, second) = ("01".repeat(48), "02".repeat(48));
    let expected = |text: &str| {
        let config = good(&format!("{SIGNER}{text}"));
        (config.desired.enclaves.values().next().unwrap().image.expected.clone(), config.warnings)
    };
    let (single, warnings) = expected(&format!("[enclave.measurements]\npcr0 = \"{first}\""));
    assert_eq!((single, warnings.len()), (one.clone().into(), 0));
    let several = format!(
        "require_signature = true\n[[enclave.measurements]]\npcr0 = \"{first}\"\n[[enclave.measurements]]\npcr0 = \"{second}\""
    );
    let (several, warnings) = expected(&several);
    assert_eq!((several, warnings.len()), (ExpectedImage::new([other, one], true), 0));
    let (signed, warnings) = expected("require_signature = true");
    assert_eq!(signed, ExpectedImage::new([], true));
    assert!(
        warnings[0].starts_with("t.toml:6:21: [[enclave]] \"signer\" require_signature: any signature"),
        "{warnings:?}"
    );
}

/// The example, with lines cut, left out, doubled, or with other numbers and words in them.
fn nearly_toml() -> impl Strategy<Value = String> {
    let lines: Vec<String> = whole_example().lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
    const WORDS: &[&str] = &[
        "0",
        "1",
        "443",
        "8000",
        "65536",
        "-1",
        "\"\"",
        "\"/\"",
        "\"a.example\"",
        "\"1s\"",
        "[]",
        "{}",
        "true",
        "é",
        "\"127.0.0.1:0\"",
    ];
    let change = (any::<prop::sample::Index>(), 0..7_u8, any::<prop::sample::Index>(), proptest::sample::select(WORDS));
    prop::collection::vec(change, 0..6).prop_map(move |changes| {
        let mut lines = lines.clone();
        for (line, how, at, word) in changes {
            let number = line.index(lines.len());
            let line = lines[number].clone();
            let cut = (0..=at.index(line.len() + 1)).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
            lines[number] = match how {
                0 => String::new(),
                1 => line[..cut].to_owned(),
                2 => format!("{}{word}{}", &line[..cut], &line[cut..]),
                3 => format!("{line}\n{line}"),
                // Another value for the key.
                _ => format!("{}= {word}", line.split('=').next().unwrap_or_default()),
            };
        }
        lines.join("\n")
    })
}

/// The routes as if every enclave had one generation.
fn routes(config: &Config) -> Routes {
    let mut routes = enclaved_core::plan::routing::routes(&config.desired, &Ledger::default());
    let mut cid = Cid::FIRST;
    for (enclave, spec) in &config.desired.enclaves {
        cid = cid.next();
        routes.egress.extend(spec.egress.iter().map(|endpoint| EgressRoute {
            enclave: enclave.clone(),
            cid,
            vsock_port: endpoint.vsock_port,
            hostname: endpoint.hostname.clone(),
            port: endpoint.port,
            allow_addresses: endpoint.allow_addresses.clone(),
            sni: endpoint.sni,
            limits: endpoint.limits,
        }));
    }
    routes
}

#[test]
fn the_examples_routes_are_ones_that_the_proxy_takes() {
    let routes = routes(&good(&whole_example()));
    assert!(routes.egress.len() > 1 && !routes.sites.is_empty() && !routes.tcp.is_empty());
    routes.check().unwrap();
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in ".{0,200}") {
        drop(parsed(&text));
    }

    /// The proxy refuses a snapshot as a whole: a configuration must not lead to one that it refuses.
    #[test]
    fn what_is_good_makes_routes_that_the_proxy_takes(text in nearly_toml()) {
        if let Ok(config) = parsed(&text) {
            routes(&config).check().map_err(|error| TestCaseError::fail(error.to_string()))?;
        }
    }

    #[test]
    fn no_near_configuration_makes_it_panic_and_every_error_names_its_place(text in nearly_toml()) {
        if let Err(errors) = parsed(&text) {
            prop_assert!(errors.iter().count() > 0);
            for error in errors.iter() {
                prop_assert!(error.to_string().starts_with("t.toml:"), "{}", error);
                let position = error.position.unwrap();
                prop_assert!(position.line <= text.split('\n').count() && position.column > 0);
                prop_assert!(!error.to_string().contains('\n'), "{}", error);
            }
        }
    }
}
