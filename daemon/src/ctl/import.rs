//! From AWS's vsock-proxy: its allowlist (vsock-proxy.yaml) and the systemd units that run it become `[[enclave.egress]]`.
//! Pure.
//!
//! The allowlist's grammar is a list of two keys, so it is read here, strictly, rather than by a reader of all of YAML: what
//! is written in another way is refused with its place, and nothing is guessed.

use enclaved_core::egress_policy;
use enclaved_core::routes::is_host;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// nitro-cli listens there for an enclave's first sign of life.
const HEARTBEAT_PORT: u32 = 9000;

/// A file as it was read.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) name: String,
    pub(super) text: String,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Imported {
    /// The endpoints, to be put under an `[[enclave]]`.
    pub(super) toml: String,
    /// What has no counterpart, or should be looked at.
    pub(super) warnings: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Remote {
    host: String,
    port: u16,
}

#[derive(Debug)]
struct Proxy {
    place: String,
    vsock_port: u32,
    remote: Remote,
}

/// All endpoints of these files; or every error, a line each.
pub(super) fn import(sources: &[Source]) -> Result<Imported, String> {
    let (mut proxies, mut allowed, mut has_allowlist) = (Vec::new(), BTreeMap::new(), false);
    let (mut warnings, mut errors) = (Vec::new(), Vec::new());
    for source in sources {
        let is_unit =
            source.text.lines().any(|line| line.trim_start().starts_with("ExecStart") || line.trim() == "[Service]");
        if is_unit {
            read_unit(source, &mut proxies, &mut warnings, &mut errors);
        } else {
            has_allowlist = true;
            for (place, remote) in read_allowlist(source, &mut errors) {
                allowed.entry(remote).or_insert(place);
            }
        }
    }
    let mut ports = BTreeMap::new();
    for Proxy { place, vsock_port, .. } in &proxies {
        if *vsock_port == HEARTBEAT_PORT {
            errors.push(format!("{place}: vsock port {HEARTBEAT_PORT} is nitro-cli's own for an enclave's first sign of life: choose another, and have the enclave use it"));
        }
        if let Some(first) = ports.insert(*vsock_port, place) {
            errors.push(format!("{place}: vsock port {vsock_port} is taken already, at {first}"));
        }
    }
    if !errors.is_empty() {
        return Err(errors.join("\n"));
    }
    let mut toml = String::new();
    let mut used = BTreeSet::new();
    for Proxy { place, vsock_port, remote } in &proxies {
        if has_allowlist && !allowed.contains_key(remote) {
            let Remote { host, port } = remote;
            warnings.push(format!("{place}: {host}:{port} is in no allowlist given here, so that vsock-proxy would refuse it; enclaved will not"));
        }
        used.insert(remote);
        toml.push_str(&endpoint(remote, Some(*vsock_port), &mut warnings, place));
    }
    for (remote, place) in allowed.iter().filter(|(remote, _)| !used.contains(remote)) {
        let Remote { host, port } = remote;
        warnings.push(format!("{place}: {host}:{port} is allowed, and no unit given here leads there: choose a vsock_port, or leave it out"));
        let text = endpoint(remote, None, &mut warnings, place);
        toml.extend(text.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("#{line}\n") }));
    }
    Ok(Imported { toml, warnings })
}

fn endpoint(remote: &Remote, vsock_port: Option<u32>, warnings: &mut Vec<String>, place: &str) -> String {
    let Remote { host, port } = remote;
    let vsock_port = vsock_port.map_or("0 # choose one".to_owned(), |port| port.to_string());
    // A name of a host has nothing that TOML would read in another way.
    let mut text = format!("[[enclave.egress]]\nhostname = \"{host}\"\nport = {port}\nvsock_port = {vsock_port}\n");
    if let Ok(address) = host.parse::<IpAddr>()
        && let Err(refusal) = egress_policy::check(address, &[], &[])
    {
        warnings.push(format!("{place}: {host} is {refusal}, which an enclave reaches only because allow_addresses says so: is that meant?"));
        text.push_str(&format!("allow_addresses = [\"{host}\"]\n"));
    }
    text.push('\n');
    text
}

fn remote(host: &str, port: &str) -> Result<Remote, String> {
    if !is_host(host) {
        return Err(format!("\"{}\" is neither a DNS name nor an IP address", host.escape_debug()));
    }
    match port.parse() {
        Ok(0) | Err(_) => Err(format!("\"{}\" is no TCP port: allowed are 1 to 65535", port.escape_debug())),
        Ok(port) => Ok(Remote { host: host.to_owned(), port }),
    }
}

/// `allowlist:` and items of `address` and `port`, as `- {address: a, port: 1}` or in two lines.
fn read_allowlist(source: &Source, errors: &mut Vec<String>) -> Vec<(String, Remote)> {
    const FORM: &str = "allowed: `allowlist:` and items as `- {address: kms.us-east-1.amazonaws.com, port: 443}`, each in a line, or with address and port in lines of their own";
    let mut items: Vec<(String, BTreeMap<String, String>)> = Vec::new();
    let (mut begun, mut failed) = (false, Vec::new());
    for (number, raw) in source.text.lines().enumerate() {
        let place = format!("{}:{}", source.name, number + 1);
        let line = match raw.find(" #") {
            _ if raw.trim_start().starts_with('#') => "",
            Some(at) => &raw[..at],
            None => raw,
        };
        let words = line.trim();
        if words.is_empty() || words == "---" {
            continue;
        }
        if !begun {
            begun = words == "allowlist:" && line.starts_with("allowlist");
            if !begun {
                failed.push(format!("{place}: this is not where an allowlist begins; {FORM}"));
                break;
            }
            continue;
        }
        let (item, rest) = match words.strip_prefix('-') {
            Some(rest) => (true, rest.trim()),
            None => (false, words),
        };
        if item {
            items.push((place.clone(), BTreeMap::new()));
        }
        let braced = rest.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
        let pairs: Vec<_> = braced.map_or_else(|| vec![rest], |inner| inner.split(',').collect());
        for pair in pairs {
            let entry = pair.split_once(':').map(|(key, value)| (key.trim(), unquoted(value.trim())));
            match (entry, items.last_mut()) {
                (Some((key @ ("address" | "port"), value)), Some((_, known))) if !value.is_empty() => {
                    if known.insert(key.to_owned(), value.to_owned()).is_some() {
                        failed.push(format!("{place}: {key} is given twice for one item"));
                    }
                }
                _ if item && rest.is_empty() => {}
                _ => failed.push(format!("{place}: not understood: {}; {FORM}", words.escape_debug())),
            }
        }
    }
    if !begun && failed.is_empty() {
        failed.push(format!(
            "{}: neither an allowlist nor a unit: there is no `allowlist:` and no `ExecStart=` in it",
            source.name
        ));
    }
    let mut remotes = Vec::new();
    for (place, item) in items.iter().filter(|_| failed.is_empty()) {
        match (item.get("address"), item.get("port")) {
            (Some(address), Some(port)) => match remote(address, port) {
                Ok(remote) => remotes.push((place.clone(), remote)),
                Err(error) => errors.push(format!("{place}: {error}")),
            },
            (None, _) => errors.push(format!("{place}: the item has no address")),
            (_, None) => errors.push(format!("{place}: the item has no port")),
        }
    }
    errors.append(&mut failed);
    remotes
}

fn unquoted(text: &str) -> &str {
    let quoted = |quote| text.strip_prefix(quote).and_then(|text: &str| text.strip_suffix(quote));
    quoted('"').or_else(|| quoted('\'')).unwrap_or(text)
}

/// Every `ExecStart=` that runs vsock-proxy. An empty one takes back those before it, as systemd has it.
fn read_unit(source: &Source, proxies: &mut Vec<Proxy>, warnings: &mut Vec<String>, errors: &mut Vec<String>) {
    let mut found = Vec::new();
    let mut lines = source.text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let place = format!("{}:{}", source.name, number + 1);
        let mut line = line.trim().to_owned();
        while line.ends_with('\\') {
            line.pop();
            match lines.next() {
                Some((_, next)) => line.push_str(&format!(" {}", next.trim())),
                None => break,
            }
        }
        let Some((_, command)) = line.split_once('=').filter(|(key, _)| key.trim() == "ExecStart") else { continue };
        let command = command.trim();
        if command.is_empty() {
            found.clear();
        } else {
            found.push((place, command.to_owned()));
        }
    }
    if found.is_empty() {
        warnings.push(format!("{}: it runs nothing (no ExecStart=)", source.name));
    }
    for (place, command) in found {
        if !command.contains("vsock-proxy") {
            warnings.push(format!("{place}: it does not run vsock-proxy; left out"));
            continue;
        }
        match read_command(&command) {
            Ok((proxy, without)) => {
                warnings.extend(without.into_iter().map(|option| format!("{place}: {option}")));
                let (vsock_port, remote) = proxy;
                proxies.push(Proxy { place, vsock_port, remote });
            }
            Err(error) => errors.push(format!("{place}: {error}")),
        }
    }
}

/// `vsock-proxy [options] LOCAL_PORT REMOTE_HOST REMOTE_PORT`, with options anywhere; and what is said of its options.
fn read_command(command: &str) -> Result<((u32, Remote), Vec<String>), String> {
    if command.contains('$') || command.contains("%") {
        return Err("the command has variables or specifiers ($ or %), whose values are not in the file: write them out (the region, say) and import that".to_owned());
    }
    let mut words = command.split_whitespace().map(|word| word.trim_matches(['"', '\'']));
    let program = words.by_ref().find(|word| word.rsplit('/').next() == Some("vsock-proxy"));
    program.ok_or("vsock-proxy is not a word of its own in the command")?;
    let (mut positional, mut without) = (Vec::new(), Vec::new());
    while let Some(word) = words.next() {
        let (option, value) = word.split_once('=').map_or((word, None), |(option, value)| (option, Some(value)));
        match option {
            "-4" | "--ipv4" | "-6" | "--ipv6" => {
                without.push(format!(
                    "{option} has no counterpart: enclaved tries all addresses of a name, of both families"
                ));
            }
            "-w" | "--num_workers" | "--config" | "-c" => {
                let value = value.or_else(|| words.next()).ok_or(format!("{option} has no value"))?;
                if option.ends_with('w') || option.ends_with("workers") {
                    without.push(format!("{option} {value} has no counterpart: there are no workers that could be taken up; see max_connections"));
                }
            }
            _ if option.starts_with('-') => {
                return Err(format!("the option {} is not known here", word.escape_debug()));
            }
            _ => positional.push(word),
        }
    }
    let [local, host, port] = positional[..] else {
        return Err(format!(
            "there are {} arguments where LOCAL_PORT REMOTE_HOST REMOTE_PORT belong",
            positional.len()
        ));
    };
    let vsock_port = local.parse::<u32>().ok().filter(|port| !matches!(*port, 0 | u32::MAX));
    let vsock_port = vsock_port.ok_or_else(|| format!("\"{}\" is no vsock port", local.escape_debug()))?;
    Ok(((vsock_port, remote(host, port)?), without))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{SourceFile, parse};

    fn files(texts: &[&str]) -> Vec<Source> {
        let sources = texts.iter().zip(1..);
        sources.map(|(text, number)| Source { name: format!("f{number}"), text: (*text).to_owned() }).collect()
    }

    const UNIT: &str = "[Service]\nExecStart=\nExecStart=/usr/bin/vsock-proxy -4 8000 kms.us-east-1.amazonaws.com 443 \\\n  --num_workers 8 --config /etc/x.yaml\n";

    #[test]
    fn an_allowlist_and_a_drop_in_become_endpoints_that_the_configuration_takes() {
        let yaml = "# ours\nallowlist:\n- {address: kms.us-east-1.amazonaws.com, port: 443}\n- address: \"127.0.0.1\" # here\n  port: 5432\n";
        let Imported { toml, warnings } = import(&files(&[yaml, UNIT])).unwrap();
        assert_eq!(
            toml,
            "[[enclave.egress]]\nhostname = \"kms.us-east-1.amazonaws.com\"\nport = 443\nvsock_port = 8000\n\n\
             #[[enclave.egress]]\n#hostname = \"127.0.0.1\"\n#port = 5432\n#vsock_port = 0 # choose one\n#allow_addresses = [\"127.0.0.1\"]\n\n"
        );
        assert_eq!(warnings.len(), 4, "{warnings:#?}");
        assert!(warnings[0].starts_with("f2:3: -4 has no counterpart") && warnings[1].contains("--num_workers 8"));
        assert!(warnings[2].starts_with("f1:4: 127.0.0.1:5432 is allowed, and no unit"));
        let config = format!("[[enclave]]\nname = \"x\"\nimage = \"file:///x\"\ncpus = 2\nmemory_mib = 64\n{toml}");
        let config = parse(&[SourceFile { path: "t".into(), text: config }]).unwrap();
        assert_eq!(config.desired.enclaves.values().next().unwrap().egress[0].vsock_port, 8000);
    }

    #[test]
    fn a_proxy_to_what_no_allowlist_has_is_imported_with_a_warning() {
        let warnings = import(&files(&["allowlist:\n- {address: a.example.com, port: 443}\n", UNIT])).unwrap().warnings;
        assert!(warnings.iter().any(|text| text.contains("is in no allowlist given here")), "{warnings:#?}");
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_place_and_nothing_is_guessed() {
        let exec = |arguments: &str| format!("[Service]\nExecStart=/usr/bin/vsock-proxy {arguments}\n");
        for (text, error) in [
            (String::new(), "f1: neither an allowlist nor a unit"),
            ("allow:\n- x".to_owned(), "f1:1: this is not where an allowlist begins"),
            ("allowlist:\n- {address: a b, port: 1}".to_owned(), "f1:2: \"a b\" is neither"),
            ("allowlist:\n- {address: a, port: 0}".to_owned(), "f1:2: \"0\" is no TCP port"),
            ("allowlist:\n- {address: a}".to_owned(), "f1:2: the item has no port"),
            ("allowlist:\n- {address: a, port: 1, x: 2}".to_owned(), "f1:2: not understood"),
            ("allowlist:\n- &x\n  address: a\n".to_owned(), "f1:2: not understood"),
            ("allowlist:\n- address: a\n  address: b\n  port: 1\n".to_owned(), "f1:3: address is given twice"),
            (exec("8000 a"), "f1:2: there are 2 arguments"),
            (exec("0 a 443"), "f1:2: \"0\" is no vsock port"),
            (exec("9000 a 443"), "f1:2: vsock port 9000 is nitro-cli's own"),
            (exec("8000 kms.${REGION}.amazonaws.com 443"), "f1:2: the command has variables"),
            (exec("--new 8000 a 443"), "f1:2: the option --new is not known here"),
            (
                format!("{}ExecStart=/usr/bin/vsock-proxy 8000 b 443\n", exec("8000 a 443")),
                "f1:3: vsock port 8000 is taken already, at f1:2",
            ),
        ] {
            let errors = import(&files(&[&text])).unwrap_err();
            assert!(errors.starts_with(error), "{text:?}: {errors}");
        }
    }
}
