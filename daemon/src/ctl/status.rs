//! The status as people read it. Pure: times are reckoned from the moment the status was made.

use super::table::{Align, pairs, render};
use super::text::{cut, progress, span};
use enclaved_core::id::{EnclaveName, Timestamp};
use enclaved_core::status::{EnclaveState, EnclaveStatus, Health, PoolStatus, Problem, Status};
use serde_json::Value;

/// Digits of a digest that tell images apart.
const SHORT: usize = 12;
/// Characters of an error that fit the table.
const SHORT_ERROR: usize = 40;

/// The host in two lines, a table of the enclaves, what is under way, and what is wrong.
pub(super) fn overview(status: &Status, wide: bool) -> String {
    let mut text = host(status);
    text.push('\n');
    if status.enclaves.is_empty() {
        text.push_str("no enclaves are configured\n");
    } else {
        let rows: Vec<_> = status.enclaves.iter().map(|enclave| row(enclave, status.at, wide)).collect();
        text.push_str(&render(HEADS, &rows));
    }
    section(&mut text, "waiting or under way", status.enclaves.iter().flat_map(under_way));
    section(&mut text, "next steps", status.steps.iter().cloned());
    section(&mut text, "problems", status.problems.iter().flat_map(problem));
    text
}

/// One enclave, with everything that is known of it.
pub(super) fn detail(status: &Status, name: &EnclaveName) -> String {
    let Some(enclave) = status.enclaves.iter().find(|enclave| enclave.name == *name) else { return String::new() };
    let none = || "-".to_owned();
    let or_none = |value: Option<String>| value.unwrap_or_else(none);
    let since = enclave.since.map(|since| format!(", since {since} ({} ago)", span(status.at.since(since))));
    let mut lines = vec![
        ("enclave", enclave.name.to_string()),
        ("state", format!("{}{}", enclave.state.as_str(), since.unwrap_or_default())),
        ("waits for", or_none(enclave.waiting_for.clone())),
        ("health", health(&enclave.health)),
        ("generation", or_none(enclave.generation.map(|generation| generation.to_string()))),
        ("others", or_none((!enclave.others.is_empty()).then(|| enclave.others.join(", ")))),
        ("CID", or_none(enclave.cid.map(|cid| cid.to_string()))),
        ("CPUs", enclave.cpus.to_string()),
        ("memory", enclave.memory_mib.to_string()),
        ("image", or_none(enclave.image.clone())),
        ("SHA-256", or_none(enclave.image_digest.map(|digest| digest.to_string()))),
        ("PCR0", or_none(enclave.pcr0.map(|pcr| pcr.to_string()))),
        ("PCR1", or_none(enclave.pcr1.map(|pcr| pcr.to_string()))),
        ("PCR2", or_none(enclave.pcr2.map(|pcr| pcr.to_string()))),
        ("certificate", or_none(enclave.image_certificate_expires.map(|at| format!("valid until {at}")))),
        ("last polled", or_none(enclave.image_polled_at.map(|at| format!("{} ago", span(status.at.since(at)))))),
        ("enclave id", or_none(enclave.enclave_id.clone())),
        ("process", or_none(enclave.pid.map(|pid| pid.to_string()))),
        ("restarts", enclave.restarts.to_string()),
    ];
    if enclave.debug {
        lines.insert(2, ("debug mode", "yes: its attestation proves nothing (all PCRs in it are zero)".to_owned()));
    }
    if let Some(fetch) = &enclave.fetch {
        lines.push(("download", progress(fetch)));
    }
    if let Some(error) = &enclave.last_error {
        let ago = span(status.at.since(error.at));
        lines.push(("last error", format!("{} ({ago} ago): {}", error.at, error.failure.message)));
        lines.extend(error.failure.remedy.iter().map(|remedy| ("remedy", remedy.clone())));
    }
    let mut text = pairs(&lines);
    let about = |problem: &&Problem| problem.about == name.as_str() || !is_enclave(status, &problem.about);
    section(&mut text, "problems", status.problems.iter().filter(about).flat_map(problem));
    text
}

/// The answer of the plan API.
pub(super) fn plan(plan: &Value) -> String {
    let mut text = String::new();
    let steps: Vec<_> = plan.get("steps").and_then(Value::as_array).into_iter().flatten().collect();
    if steps.is_empty() {
        text.push_str("nothing to do\n");
    }
    for (number, step) in steps.iter().enumerate() {
        text.push_str(&format!("{}. {}\n", number + 1, step.as_str().unwrap_or_default()));
    }
    let waits = plan.get("waits").and_then(Value::as_object).into_iter().flatten();
    section(&mut text, "waiting", waits.map(|(name, what)| format!("{name}: {}", what.as_str().unwrap_or_default())));
    text
}

/// Where an enclave stands, in one line without times (so that it changes only when something happens).
pub(super) fn stand(enclave: &EnclaveStatus) -> String {
    let state = enclave.state.as_str();
    let detail = match (&enclave.fetch, &enclave.health, &enclave.waiting_for) {
        (Some(fetch), ..) => Some(format!("its image, {}", progress(fetch))),
        (None, Health::Failing { error } | Health::Unhealthy { error }, _) => {
            Some(format!("its health check says: {error}"))
        }
        (None, _, Some(waits)) => Some(waits.clone()),
        (None, _, None) => None,
    };
    let error = match enclave.state {
        EnclaveState::ImageFailed | EnclaveState::Waiting | EnclaveState::Ended => enclave.last_error.as_ref(),
        _ => None,
    };
    let mut text = format!("{}: {state}", enclave.name);
    if let Some(detail) = detail {
        text.push_str(&format!(": {detail}"));
    }
    // What it waits for may have said it already.
    if let Some(error) = error.filter(|error| !text.contains(&error.failure.message)) {
        text.push_str(&format!(": {}", error.failure.message));
    }
    if let Some(remedy) = error.and_then(|error| error.failure.remedy.as_ref()) {
        text.push_str(&format!(" ({remedy})"));
    }
    text
}

/// The schema of the status.
pub(super) fn schema() -> Value {
    let settings = schemars::generate::SchemaSettings::draft2020_12().for_serialize();
    settings.into_generator().into_root_schema_for::<Status>().to_value()
}

fn host(status: &Status) -> String {
    let host = &status.host;
    let places = [&host.instance_id, &host.instance_type, &host.availability_zone];
    let place: Vec<_> = places.into_iter().flatten().map(String::as_str).collect();
    let pool = match (host.pool_cpus, host.pool_memory_mib, host.pool_memory_free_mib) {
        (Some(cpus), Some(memory), Some(free)) => format!("; enclaves may use {cpus} CPUs, {memory} ({free} free)"),
        _ => String::new(),
    };
    let proxy = &status.proxy;
    let https = proxy.https.as_ref().map(|https| format!(", HTTPS on {https}")).unwrap_or_default();
    let routes = if proxy.current { "" } else { ", not on the current routes yet" };
    let failed = match proxy.listeners_failed {
        0 => String::new(),
        failed => format!(", {failed} NOT open"),
    };
    let proxy = match proxy.running {
        true => format!("running (pid {}), {} listeners open{failed}{https}{routes}", proxy.pid, proxy.listeners_open),
        false => "NOT RUNNING".to_owned(),
    };
    let mut lines = vec![
        ("host", format!("{}{pool}", if place.is_empty() { "(not on EC2)".to_owned() } else { place.join(", ") })),
        (
            "enclaved",
            format!(
                "{}; {} (pid {}), up {}, configuration {}{}",
                if status.ready { "ready" } else { "NOT READY" },
                host.version,
                host.pid,
                span(status.at.since(host.started_at)),
                host.config_revision,
                host.metrics.as_ref().map(|address| format!(", metrics on {address}")).unwrap_or_default()
            ),
        ),
        ("proxy", proxy),
    ];
    if let Some(pool) = &host.pool {
        lines.push(("pool", self::pool(pool)));
    }
    pairs(&lines)
}

/// What enclaved is to set aside, and why it is not there.
fn pool(pool: &PoolStatus) -> String {
    let wanted = match (pool.wanted_cpus, pool.wanted_memory_mib) {
        (Some(cpus), Some(memory)) => format!("{cpus} CPUs, {memory} wanted"),
        _ => "nothing wanted".to_owned(),
    };
    let state = match &pool.waiting_for {
        None if pool.settled => "reserved".to_owned(),
        Some(why) if pool.settled => why.clone(),
        None => "not reserved yet".to_owned(),
        Some(why) => format!("NOT RESERVED: {why}"),
    };
    format!("managed, \"{}\"; {wanted}, {state}", pool.policy.as_str())
}

const HEADS: &[(&str, Align)] = &[
    ("NAME", Align::Left),
    ("GEN", Align::Right),
    ("STATE", Align::Left),
    ("SINCE", Align::Left),
    ("CID", Align::Right),
    ("CPUS", Align::Right),
    ("MEMORY", Align::Right),
    ("IMAGE", Align::Left),
    ("PCR0", Align::Left),
    ("HEALTH", Align::Left),
    ("RESTARTS", Align::Right),
    ("LAST ERROR", Align::Left),
];

fn row(enclave: &EnclaveStatus, now: Timestamp, wide: bool) -> Vec<String> {
    let none = || "-".to_owned();
    let short = |text: String| if wide { text } else { text.chars().take(SHORT).collect() };
    let error = enclave.last_error.as_ref().map(|error| {
        let message = if wide { error.failure.message.clone() } else { cut(&error.failure.message, SHORT_ERROR) };
        format!("{} ago: {message}", span(now.since(error.at)))
    });
    let debug = if enclave.debug { " DEBUG" } else { "" };
    let health = match &enclave.health {
        Health::None => none(),
        Health::Unknown => "unknown".to_owned(),
        Health::Healthy => "healthy".to_owned(),
        Health::Failing { .. } => "failing".to_owned(),
        Health::Unhealthy { .. } => "UNHEALTHY".to_owned(),
    };
    vec![
        enclave.name.to_string(),
        enclave.generation.map_or_else(none, |generation| generation.to_string()),
        format!("{}{debug}", enclave.state.as_str()),
        enclave.since.map_or_else(none, |since| format!("{} ago", span(now.since(since)))),
        enclave.cid.map_or_else(none, |cid| cid.to_string()),
        enclave.cpus.to_string(),
        enclave.memory_mib.to_string(),
        enclave.image_digest.map_or_else(none, |digest| short(digest.to_string())),
        enclave.pcr0.map_or_else(none, |pcr| short(pcr.to_string())),
        health,
        enclave.restarts.to_string(),
        error.unwrap_or_else(none),
    ]
}

fn health(health: &Health) -> String {
    match health {
        Health::None => "no health check".to_owned(),
        Health::Unknown => "not checked yet".to_owned(),
        Health::Healthy => "healthy".to_owned(),
        Health::Failing { error } => format!("failing: {error}"),
        Health::Unhealthy { error } => format!("UNHEALTHY: {error}"),
    }
}

/// What happens with an enclave just now, beside its state.
fn under_way(enclave: &EnclaveStatus) -> Vec<String> {
    let mut lines = Vec::new();
    let name = &enclave.name;
    lines.extend(enclave.fetch.map(|fetch| format!("{name}: its image, {}", progress(&fetch))));
    lines.extend(enclave.waiting_for.as_ref().map(|waits| format!("{name}: {waits}")));
    if !enclave.others.is_empty() {
        lines.push(format!("{name}: other generations: {}", enclave.others.join(", ")));
    }
    lines
}

pub(super) fn problem(problem: &Problem) -> Vec<String> {
    let mut lines = vec![format!("{}: {}", problem.about, problem.failure.message)];
    lines.extend(problem.failure.remedy.iter().map(|remedy| format!("  remedy: {remedy}")));
    lines
}

fn is_enclave(status: &Status, about: &str) -> bool {
    status.enclaves.iter().any(|enclave| enclave.name.as_str() == about)
}

/// Adds a list under a head, if there is anything in it.
fn section(text: &mut String, head: &str, lines: impl Iterator<Item = String>) {
    let mut lines = lines.peekable();
    if lines.peek().is_some() {
        text.push_str(&format!("\n{head}:\n"));
    }
    for line in lines {
        // A message may have lines of its own.
        text.push_str(&format!("  {}\n", line.replace('\n', "\n  ")));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use enclaved_core::failure::Failure;
    use enclaved_core::status::{FetchStage, FetchStatus, LastError};
    use serde_json::json;

    /// A host with these enclaves; the status was made at second 1000.
    pub(in crate::ctl) fn sample(enclaves: Value) -> Status {
        serde_json::from_value(json!({
            "at": "2026-01-01T01:00:00.000Z",
            "ready": true,
            "host": {
                "instance_id": "i-0123", "instance_type": "m5.xlarge", "availability_zone": "us-east-1a", "boot_id": "b",
                "version": "0.1.0", "pid": 7, "started_at": "2026-01-01T00:57:00.000Z", "config_revision": "abcdef123456",
                "pool_cpus": 2, "pool_memory_mib": 4096, "pool_memory_free_mib": 3072,
            },
            "proxy": {
                "running": true, "pid": 8, "current": true, "https": "[::]:443", "listeners_open": 3, "listeners_failed": 0,
            },
            "problems": [],
            "enclaves": enclaves,
            "steps": [],
        }))
        .unwrap()
    }

    pub(in crate::ctl) fn enclave(name: &str, state: &str) -> Value {
        json!({
            "name": name, "state": state, "ready": state == "ready", "wanted": true, "cpus": 2, "memory_mib": 1024,
            "debug": false, "health": { "state": "none" }, "restarts": 0,
        })
    }

    fn with(mut enclave: Value, more: Value) -> Value {
        enclave.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        enclave
    }

    fn running() -> Value {
        with(
            enclave("signer", "ready"),
            json!({
                "generation": 3, "since": "2026-01-01T00:57:50.000Z", "cid": 18, "image": "s3://bucket/signer.eif",
                "image_digest": "ab".repeat(32), "pcr0": "cd".repeat(48), "pcr1": "ef".repeat(48), "pcr2": "01".repeat(48),
                "enclave_id": "i-0123-enc1", "pid": 99, "health": { "state": "healthy" }, "restarts": 1,
                "last_error": { "at": "2026-01-01T00:57:00.000Z", "message": "it ended: and nobody had asked it to, which is bad" },
            }),
        )
    }

    #[test]
    fn the_overview_of_a_host_that_is_well_is_short() {
        let text = overview(&sample(json!([running(), enclave("ledger", "held")])), false);
        let expected = "    host: i-0123, m5.xlarge, us-east-1a; enclaves may use 2 CPUs, 4096 MiB (3072 MiB free)
enclaved: ready; 0.1.0 (pid 7), up 3m, configuration abcdef123456
   proxy: running (pid 8), 3 listeners open, HTTPS on [::]:443

NAME    GEN  STATE  SINCE       CID  CPUS    MEMORY  IMAGE         PCR0          HEALTH   RESTARTS  LAST ERROR
signer    3  ready  2m 10s ago   18     2  1024 MiB  abababababab  cdcdcdcdcdcd  healthy         1  3m ago: it ended: and nobody had asked it to, wh…
ledger    -  held   -             -     2  1024 MiB  -             -             -               0  -
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_pool_that_enclaved_manages_has_a_line_that_says_what_is_wanted_and_why_it_is_not_there() {
        let mut status = sample(json!([]));
        let pool = |settled, waiting_for: Option<&str>| PoolStatus {
            wanted_cpus: Some(6),
            wanted_memory_mib: Some(enclaved_core::id::MemoryMib(28_672)),
            settled,
            waiting_for: waiting_for.map(str::to_owned),
            ..PoolStatus::default()
        };
        for (pool, line) in [
            (pool(true, None), "\n    pool: managed, \"all\"; 6 CPUs, 28672 MiB wanted, reserved\n"),
            (pool(false, Some("1 enclave runs")), "wanted, NOT RESERVED: 1 enclave runs\n"),
            (
                PoolStatus { settled: true, waiting_for: Some("no enclave".to_owned()), ..PoolStatus::default() },
                "\"all\"; nothing wanted, no enclave\n",
            ),
        ] {
            status.host.pool = Some(pool);
            let text = overview(&status, false);
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn the_wide_overview_cuts_nothing() {
        let text = overview(&sample(json!([running()])), true);
        for whole in ["ab".repeat(32), "cd".repeat(48), "which is bad".to_owned()] {
            assert!(text.contains(&whole), "{text}");
        }
    }

    #[test]
    fn what_is_under_way_and_what_is_wrong_stand_below_the_table_with_remedies() {
        let mut status = sample(json!([enclave("signer", "fetching")]));
        status.ready = false;
        status.proxy.running = false;
        status.enclaves[0].fetch = Some(FetchStatus {
            stage: FetchStage::Downloading,
            bytes: 3 << 20,
            total: 12 << 20,
            ..FetchStatus::default()
        });
        status.enclaves[0].others = vec!["2: draining".into()];
        status.steps = vec!["launch signer-3".into()];
        let failure = Failure::new("port 443 is taken\nby nginx").with_remedy("stop it");
        status.problems = vec![Problem { about: "proxy".into(), failure }];
        let text = overview(&status, false);
        assert!(text.contains("enclaved: NOT READY; "), "{text}");
        let expected = "
waiting or under way:
  signer: its image, 3.0 MiB of 12.0 MiB (25%)
  signer: other generations: 2: draining

next steps:
  launch signer-3

problems:
  proxy: port 443 is taken
  by nginx
    remedy: stop it
";
        assert!(text.ends_with(expected), "{text}");
        assert!(text.contains("proxy: NOT RUNNING"), "{text}");
    }

    #[test]
    fn the_detail_of_an_enclave_shows_all_of_it_and_the_problems_that_concern_it() {
        let mut status = sample(json!([with(running(), json!({ "debug": true })), enclave("ledger", "waiting")]));
        let problem = |about: &str| Problem { about: about.into(), failure: Failure::new(format!("about {about}")) };
        status.problems = vec![problem("signer"), problem("ledger"), problem("host")];
        let text = detail(&status, &"signer".parse().unwrap());
        for part in [
            "state: ready, since 2026-01-01T00:57:50.000Z (2m 10s ago)",
            "debug mode: yes",
            &"01".repeat(48),
            "i-0123-enc1",
            "last error: 2026-01-01T00:57:00.000Z (3m ago)",
            "which is bad",
            "about signer",
            "about host",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        assert!(!text.contains("about ledger"), "{text}");
    }

    #[test]
    fn an_error_that_the_wait_names_already_is_not_said_twice() {
        let mut failed = sample(json!([with(enclave("a", "image-failed"), json!({ "waiting_for": "later: 403" }))]));
        failed.enclaves[0].last_error =
            Some(LastError { at: failed.at, failure: Failure::new("403").with_remedy("allow it") });
        assert_eq!(stand(&failed.enclaves[0]), "a: image-failed: later: 403 (allow it)");
    }

    #[test]
    fn where_an_enclave_stands_says_what_holds_it_up() {
        let stand_of = |value: Value| stand(&sample(json!([value])).enclaves[0]);
        assert_eq!(stand_of(enclave("a", "ready")), "a: ready");
        assert_eq!(stand_of(with(enclave("a", "waiting"), json!({ "waiting_for": "2 CPUs" }))), "a: waiting: 2 CPUs");
        assert_eq!(
            stand_of(with(enclave("a", "booting"), json!({ "health": { "state": "failing", "error": "refused" } }))),
            "a: booting: its health check says: refused"
        );
        let mut failed = sample(json!([enclave("a", "image-failed")]));
        failed.enclaves[0].last_error =
            Some(LastError { at: failed.at, failure: Failure::new("403").with_remedy("allow it") });
        assert_eq!(stand(&failed.enclaves[0]), "a: image-failed: 403 (allow it)");
    }

    #[test]
    fn a_plan_is_numbered_and_an_empty_one_says_so() {
        let text = plan(&json!({ "steps": ["fetch x", "launch y"], "waits": { "z": "memory" } }));
        assert_eq!(text, "1. fetch x\n2. launch y\n\nwaiting:\n  z: memory\n");
        assert_eq!(plan(&json!({ "steps": [] })), "nothing to do\n");
    }

    #[test]
    fn the_schema_in_the_tree_is_that_of_the_status() {
        let in_tree: Value = serde_json::from_str(include_str!("../../../config/status.schema.json")).unwrap();
        let refresh = "cargo run --bin enclavectl -- schema status > config/status.schema.json";
        assert!(in_tree == schema(), "config/status.schema.json is out of date; refresh it with\n    {refresh}");
    }
}
