//! The supervisor for hosts with systemd. This very program plays each sentence once more inside a machine, as the user that
//! enclaved runs as: with the units, the polkit rule and the D-Bus of a parent host.

#[path = "../conformance/mod.rs"]
mod sentences;

use enclaved::host::systemd::Systemd;
use enclaved::launches::LaunchSettings;
use enclaved::systemd_bus::SystemdBus;
use enclaved_integration::machine::MachineOptions;
use enclaved_integration::machine::parent::Parent;
use enclaved_integration::nitro_host::Shape;
use sentences::{Places, Stand, sentences};
use std::future::Future;

/// Set where this program runs in a machine.
const INSIDE: &str = "ENCLAVED_TEST_INSIDE";
/// Where it is there.
const SELF: &str = "/opt/conformance";

fn stand() -> Stand<Systemd> {
    let launches = LaunchSettings {
        run_dir: "/run/enclaved".into(),
        images_dir: "/var/lib/enclaved/images".into(),
        stopped_dir: "/var/lib/enclaved/stopped".into(),
        nitro_cli: "/opt/nitro/nitro-cli".into(),
    };
    let at = |name: &str| std::path::Path::new("/run/standin").join(name);
    let places =
        Places { launches, sysfs: at("sys"), vsock: at("vsock"), state: at("state"), faults: at("state/faults.json") };
    Stand::new(places, (), |places| Systemd::new(places.launches.clone(), SystemdBus::new()).unwrap())
}

fn play<F: Future<Output = ()>>(name: &str, sentence: impl FnOnce(Stand<Systemd>) -> F) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(async { sentence(stand()).await });
    }
    let options = MachineOptions::default().copy_of(std::env::current_exe().unwrap(), SELF);
    let parent = Parent::boot(&Shape::small(), options).unwrap();
    let (inside, name) = (format!("{INSIDE}=1"), format!("conformance::{name}"));
    let said = parent.run_as("enclaved", &["env", &inside, SELF, "--exact", &name, "--nocapture"]).unwrap();
    assert!(said.success() && said.stdout.contains("1 passed"), "{}\n{}", said.stdout, said.stderr);
}

macro_rules! played {
    ($($sentence:ident)*) => {
        $(
            #[test]
            fn $sentence() {
                play(stringify!($sentence), sentences::$sentence);
            }
        )*
    };
}
sentences!(played);
