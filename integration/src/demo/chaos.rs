//! What happens when something goes wrong: each part is killed in its turn, and a forged image is offered. Every stage
//! fails if enclaved does not do what it promises.

use super::life::{KEY, Life, NAME, PATIENCE, POLL, name, of, pinned, stand};
use anyhow::{Context as _, bail, ensure};
use enclaved_core::status::{EnclaveState, EnclaveStatus, Status};
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// An enclave's death is to be noticed within this time.
const NOTICED: Duration = Duration::from_secs(1);

/// All of it, one after the other.
pub(super) async fn all(life: &mut Life<'_>) -> anyhow::Result<()> {
    kill_enclave(life).await.context("after killing the enclave")?;
    kill_control(life).await.context("after killing the control process")?;
    kill_proxy(life).await.context("after killing the proxy")?;
    forge(life).await.context("with a forged image")?;
    mistype(life).await.context("with a wrong configuration")?;
    terminate(life).await.context("after SIGTERM to the control process")
}

/// Waits until the status is as it should be.
async fn until(life: &Life<'_>, what: &str, is: impl Fn(&Status) -> bool) -> anyhow::Result<Status> {
    let began = Instant::now();
    loop {
        life.check_daemon()?;
        let last = match life.admin.status().await {
            Ok(status) if is(&status) => return Ok(status),
            Ok(status) => stand(&status),
            Err(error) => format!("{error:#}"),
        };
        ensure!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}: {last}");
        sleep(POLL).await;
    }
}

async fn enclave(life: &Life<'_>) -> anyhow::Result<(EnclaveStatus, u32)> {
    let enclave = of(&life.admin.status().await?, NAME)?;
    let pid = enclave.pid.context("the enclave does not run")?;
    Ok((enclave, pid))
}

/// The same enclave, in the same process, ready.
fn is_same(status: &Status, pid: u32) -> bool {
    status.ready && of(status, NAME).is_ok_and(|enclave| enclave.pid == Some(pid))
}

async fn kill_enclave(life: &mut Life<'_>) -> anyhow::Result<()> {
    let (before, pid) = enclave(life).await?;
    life.machine.signal(pid, Signal::KILL).context("killing the enclave's process")?;
    let killed = Instant::now();
    let mut noticed = None;
    let mut looks = 0_u32;
    let after = loop {
        ensure!(!life.egress().is_empty(), "no egress listener was open {:?} later", killed.elapsed());
        looks += 1;
        life.check_daemon()?;
        let status = life.admin.status().await?;
        let enclave = of(&status, NAME)?;
        if enclave.restarts > before.restarts && noticed.is_none() {
            noticed = Some((killed.elapsed(), enclave.last_error.as_ref().map(|error| error.failure.message.clone())));
        }
        if status.ready && enclave.pid.is_some() && enclave.pid != Some(pid) {
            break enclave;
        }
        ensure!(killed.elapsed() < PATIENCE, "not relaunched: {}", stand(&status));
        sleep(POLL).await;
    };
    let relaunched = killed.elapsed();
    let (noticed, why) = noticed.context("it runs again, and nobody says that it had ended")?;
    ensure!(noticed < NOTICED, "it was noticed after {noticed:?}");
    let cid = after.cid.context("the enclave runs without a CID")?.to_string();
    let launches = life.launches()?;
    life.check_egress_before(launches.last().context("nitro-cli was not asked to launch")?, &cid)?;
    life.request("/after-the-enclave").await?;
    let text = format!(
        "kill -9 {pid}: noticed after {} ms, {} ready after {} ms; egress was open at all of {looks} looks;\nsaid: {}",
        noticed.as_millis(),
        name(&after),
        relaunched.as_millis(),
        why.unwrap_or_default()
    );
    life.stages.stage("enclave killed", text);
    Ok(())
}

/// Waits for the end of the control process.
async fn ended(life: &Life<'_>) -> anyhow::Result<ExitStatus> {
    let began = Instant::now();
    loop {
        if let Some(status) = life.machine.wait_for_end(life.daemon, Duration::ZERO)? {
            return Ok(status);
        }
        ensure!(began.elapsed() < PATIENCE, "it has not ended within {PATIENCE:?}");
        sleep(POLL).await;
    }
}

/// Starts another control process and waits until it has taken the enclave over; gives how long that took.
async fn start_again(life: &mut Life<'_>, pid: u32) -> anyhow::Result<Duration> {
    let launches = life.launches()?.len();
    life.daemon = life.machine.start_daemon().context("starting enclaved again")?;
    let began = Instant::now();
    let daemon = life.daemon;
    until(life, "adopting the enclave", |status| status.host.pid == daemon && is_same(status, pid)).await?;
    let took = began.elapsed();
    ensure!(life.launches()?.len() == launches, "it was launched once more, though it ran");
    Ok(took)
}

async fn kill_control(life: &mut Life<'_>) -> anyhow::Result<()> {
    let (_, pid) = enclave(life).await?;
    let killed = life.daemon;
    life.machine.signal(killed, Signal::KILL).context("killing the control process")?;
    let status = ended(life).await?;
    ensure!(status.signal() == Some(Signal::KILL.as_raw()), "it ended with {status}");
    life.request("/without-control").await.context("while there was no control process")?;
    let took = start_again(life, pid).await?;
    life.request("/after-control").await?;
    let took = took.as_millis();
    let text = format!("kill -9 {killed}: requests went on; started again, it adopted process {pid} within {took} ms");
    life.stages.stage("control killed", text);
    Ok(())
}

async fn kill_proxy(life: &mut Life<'_>) -> anyhow::Result<()> {
    let (_, pid) = enclave(life).await?;
    let before = life.admin.status().await?.proxy;
    let log = life.machine.log().len();
    life.machine.signal(before.pid, Signal::KILL).context("killing the proxy")?;
    let killed = Instant::now();
    let https = life.https()?;
    loop {
        match https.get("/after-the-proxy").await {
            Ok(reply) if reply.status.is_success() => break,
            Ok(reply) => ensure!(killed.elapsed() < PATIENCE, "it answers {}", reply.status),
            Err(error) => ensure!(killed.elapsed() < PATIENCE, "{error:#}"),
        }
        life.check_daemon()?;
        sleep(POLL).await;
    }
    let gap = killed.elapsed().as_millis();
    let serves = |status: &Status| status.proxy.running && status.proxy.pid != before.pid && is_same(status, pid);
    let after = until(life, "another proxy, and the same enclave", serves).await?.proxy;
    ensure!(after.revision == before.revision, "other routes: {:?} after {:?}", after.revision, before.revision);
    // The proxy logs every snapshot that is new to it.
    let handed = life.machine.log().get(log..).is_none_or(|log| log.contains("new routes"));
    ensure!(!handed, "it was handed routes, and had none of its own");
    let text = format!(
        "kill -9 {}: the next one ({}) served after {gap} ms, with the routes on its own disk; the enclave was not touched",
        before.pid, after.pid
    );
    life.stages.stage("proxy killed", text);
    Ok(())
}

async fn forge(life: &mut Life<'_>) -> anyhow::Result<()> {
    let (_, pid) = enclave(life).await?;
    let launches = life.launches()?.len();
    // The image is what it was; what it must be is another.
    let mut other = life.measured.clone();
    let pcr0 = other.registers.get_mut("PCR0").context("the image has no PCR0")?;
    *pcr0 = pcr0.chars().map(|digit| if digit == '0' { 'f' } else { '0' }).collect();
    let image = format!("s3://{}/{KEY}", life.machine.bucket());
    let forged =
        format!("[[enclave]]\nname = \"forged\"\nimage = \"{image}\"\ncpus = 2\nmemory_mib = 64\n{}", pinned(&other));
    reload(life, &format!("{}{forged}", life.config)).await?;
    let failed = |status: &Status| of(status, "forged").is_ok_and(|enclave| enclave.state == EnclaveState::ImageFailed);
    let status = until(life, "the forged image is refused", failed).await?;
    let error = of(&status, "forged")?.last_error.context("it is refused without a reason")?.failure;
    ensure!(error.message.contains("PCR0"), "it is refused for another reason: {error}");
    ensure!(life.launches()?.len() == launches, "nitro-cli was asked to launch it");
    life.request("/beside-the-forged").await?;
    let text = format!(
        "an image with another PCR0 than the pinned one is refused, and was never launched;\nsaid: {}",
        error.message
    );
    life.stages.stage("image refused", text);
    let config = life.config.clone();
    reload(life, &config).await?;
    until(life, "only the first enclave is left", |status| is_same(status, pid) && status.enclaves.len() == 1).await?;
    Ok(())
}

async fn reload(life: &Life<'_>, config: &str) -> anyhow::Result<()> {
    life.machine.write_config(config).context("writing the configuration")?;
    let reloaded = life.enclavectl(&["reload"]).await?;
    ensure!(reloaded.status.success(), "enclavectl reload: {}", String::from_utf8_lossy(&reloaded.stderr).trim_end());
    Ok(())
}

async fn mistype(life: &mut Life<'_>) -> anyhow::Result<()> {
    let (_, pid) = enclave(life).await?;
    let config = life.config.clone();
    life.machine.write_config(&config.replace("memory_mib = 64", "memory_mb = 64"))?;
    let reloaded = life.enclavectl(&["reload"]).await?;
    let reason = String::from_utf8_lossy(&reloaded.stderr).into_owned();
    match reloaded.status.code() {
        Some(78) if reason.contains("memory_mb") => {}
        _ => bail!("enclavectl reload ended with {}: {reason}", reloaded.status),
    }
    life.request("/beside-the-wrong-configuration").await?;
    let line = reason.lines().find(|line| line.contains("memory_mb")).unwrap_or_default().trim();
    life.stages.stage(
        "config refused",
        format!("a configuration with a wrong key is refused, the last good one stays;\nsaid: {line}"),
    );
    reload(life, &config).await?;
    until(life, "the corrected configuration is in force", |status| is_same(status, pid)).await?;
    Ok(())
}

async fn terminate(life: &mut Life<'_>) -> anyhow::Result<()> {
    let (_, pid) = enclave(life).await?;
    let asked = Instant::now();
    life.machine.signal(life.daemon, Signal::TERM).context("asking the control process to end")?;
    let status = ended(life).await?;
    let took = asked.elapsed().as_millis();
    ensure!(status.success(), "it ended with {status}");
    life.request("/after-sigterm").await.context("while there was no control process")?;
    let again = start_again(life, pid).await?.as_millis();
    let text = format!(
        "SIGTERM: exit 0 after {took} ms, requests went on; started again, it adopted process {pid} within {again} ms"
    );
    life.stages.stage("control ended", text);
    Ok(())
}
