//! The demo that stays up: what to try, and a line for everything that changes. It does for the control process what
//! systemd does on a real host: it starts it again.

use super::life::{Life, NAME, name};
use crate::binaries;
use enclaved_core::status::{EnclaveStatus, Status};
use std::time::Duration;
use tokio::time::sleep;

/// How often is looked for a change.
const LOOK: Duration = Duration::from_millis(50);
/// How long a control process that ended stays away.
const RESTART: Duration = Duration::from_secs(2);

/// Tells what to try, then what changes. Ends only with an error, or by being dropped.
pub(super) async fn stay(life: &mut Life<'_>) -> anyhow::Result<()> {
    let mut last = life.admin.status().await?;
    let text = invitation(life, &last)?;
    life.stages.say(&text);
    loop {
        sleep(LOOK).await;
        if let Some(status) = life.machine.wait_for_end(life.daemon, Duration::ZERO)? {
            tell(
                life,
                &format!("the control process ended ({status}); enclave and traffic go on; starting it again in 2 s"),
            );
            sleep(RESTART).await;
            life.daemon = life.machine.start_daemon()?;
            continue;
        }
        // There is none while it starts; what it was is told above.
        let Ok(status) = life.admin.status().await else { continue };
        for line in changes(&last, &status) {
            tell(life, &line);
        }
        last = status;
    }
}

fn tell(life: &mut Life<'_>, line: &str) {
    let now = humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string();
    let time = now.get(11..23).unwrap_or(&now);
    life.stages.say(&format!("{time}  {line}"));
}

fn invitation(life: &Life<'_>, status: &Status) -> anyhow::Result<String> {
    let machine = life.machine;
    let pid = status.enclaves.iter().find(|enclave| enclave.name.as_str() == NAME).and_then(|enclave| enclave.pid);
    Ok(format!(
        "\
It is up, and stays so until Ctrl-C, which ends everything and leaves nothing behind.
To try, from another terminal:

  curl --cacert {root} https://localhost:{port}/hello
  ctl() {{ {enclavectl} --socket {socket} \"$@\"; }}
  ctl status                 # also: ctl status {NAME}, ctl plan, ctl wait, ctl status --json
  ctl stop {NAME}            # drained and kept stopped, until: ctl start {NAME}
  curl http://{metrics}/metrics     # also /live, /ready
  $EDITOR {config}; ctl reload
  tail -f {log}

To break, and watch here what follows:

  kill -9 {enclave}            # the enclave (nitro-cli's process)
  kill -9 {proxy}            # the proxy
  kill -9 {control}            # the control process; enclave and traffic go on
",
        root = machine.proxy_state_dir().join("ca/root.crt").display(),
        port = machine.ingress().port(),
        enclavectl = binaries::find("enclavectl")?.display(),
        socket = life.admin.socket.display(),
        metrics = machine.metrics(),
        config = machine.config_file().display(),
        log = machine.log_file().display(),
        enclave = pid.unwrap_or_default(),
        proxy = status.proxy.pid,
        control = status.host.pid,
    ))
}

/// What differs, for people.
fn changes(before: &Status, after: &Status) -> Vec<String> {
    let mut lines = Vec::new();
    if after.host.pid != before.host.pid {
        lines.push(format!("another control process answers: {}", after.host.pid));
    }
    if (after.proxy.running, after.proxy.pid) != (before.proxy.running, before.proxy.pid) {
        lines.push(match after.proxy.running {
            true => format!("the proxy runs as process {}", after.proxy.pid),
            false => "the proxy is gone".to_owned(),
        });
    }
    if after.host.config_revision != before.host.config_revision {
        lines.push(format!("configuration {} is in force", after.host.config_revision));
    }
    for enclave in &after.enclaves {
        let former = before.enclaves.iter().find(|former| former.name == enclave.name);
        if former.is_none_or(|former| told(former) != told(enclave)) {
            lines.push(told(enclave));
        }
    }
    let gone = before.enclaves.iter().filter(|former| after.enclaves.iter().all(|enclave| enclave.name != former.name));
    lines.extend(gone.map(|former| format!("{} is no more", former.name)));
    let news = after.problems.iter().filter(|problem| !before.problems.contains(problem));
    lines.extend(news.map(|problem| format!("problem: {}: {}", problem.about, problem.failure)));
    lines
}

fn told(enclave: &EnclaveStatus) -> String {
    let mut text = format!("{} is {}", name(enclave), enclave.state.as_str());
    if let (Some(cid), Some(pid)) = (enclave.cid, enclave.pid) {
        text.push_str(&format!(", CID {cid}, process {pid}"));
    }
    if let Some(waits) = &enclave.waiting_for {
        text.push_str(&format!(": {waits}"));
    }
    text
}
