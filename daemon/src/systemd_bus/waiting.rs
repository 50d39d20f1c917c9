//! What comes before a job begins: whether its unit can be run at all, and how a job that has not begun is taken back.

use super::failure::{about, bus_failure, is_named};
use super::name::{check_name, label};
use super::{PROPERTIES, SYSTEMD, SystemdBus, UNITS_PATH, call};
use enclaved_core::failure::Failure;
use zbus::OwnedVariant;

const UNIT: &str = "org.freedesktop.systemd1.Unit";
const JOB: &str = "org.freedesktop.systemd1.Job";

impl SystemdBus {
    /// Whether systemd could run that unit: `loaded`; or why not: `not-found`, `masked`, `bad-setting`, `error`. It is loaded for
    /// that, if it is not yet.
    ///
    /// # Errors
    /// systemd can't be asked.
    pub async fn load_state(&self, unit: &str) -> Result<String, Failure> {
        check_name(unit)?;
        let doing = || format!("asking systemd for {unit}");
        let connection = self.connection().await.map_err(|failure| about(&doing(), failure))?;
        let path = format!("{UNITS_PATH}{}", label(unit));
        let answer = call(&connection, &path, PROPERTIES, "Get", &(UNIT, "LoadState")).await;
        let state = answer.and_then(|answer| answer.body().deserialize::<OwnedVariant>());
        state.and_then(String::try_from).map_err(|error| bus_failure(&doing(), &error))
    }

    /// Takes back the job for that unit that systemd has not begun. `false`: there is none, or it has begun. Whoever has enqueued it
    /// may do that without any right to the unit, as long as the connection is the same.
    ///
    /// # Errors
    /// systemd can't be asked, or refuses.
    pub async fn take_back(&self, unit: &str) -> Result<bool, Failure> {
        check_name(unit)?;
        let doing = || format!("taking back the job for {unit}");
        let job = self.listed(unit).await?.into_iter().find(|listed| listed.7 != 0).map(|listed| listed.9);
        let Some(job) = job else { return Ok(false) };
        let connection = self.connection().await.map_err(|failure| about(&doing(), failure))?;
        let gone = |error: &zbus::Error| is_named(error, "NoSuchJob") || is_unknown_object(error);
        let state = call(&connection, job.as_str(), PROPERTIES, "Get", &(JOB, "State")).await;
        let state = state.and_then(|answer| answer.body().deserialize::<OwnedVariant>()).and_then(String::try_from);
        match state {
            Ok(state) if state == "waiting" => {}
            Ok(_) => return Ok(false),
            Err(error) if gone(&error) => return Ok(false),
            Err(error) => return Err(bus_failure(&doing(), &error)),
        }
        match call(&connection, job.as_str(), JOB, "Cancel", &()).await {
            Ok(_) => Ok(true),
            Err(error) if gone(&error) => Ok(false),
            Err(error) => Err(bus_failure(&doing(), &error)),
        }
    }
}

/// Whether there is no such job any more.
fn is_unknown_object(error: &zbus::Error) -> bool {
    use zbus::fdo;
    matches!(error, zbus::Error::FDO(error) if matches!(**error, fdo::Error::UnknownObject(_) | fdo::Error::UnknownMethod(_)))
        || matches!(error, zbus::Error::MethodError(name, ..) if !name.starts_with(SYSTEMD) && name.ends_with(".UnknownObject"))
}
