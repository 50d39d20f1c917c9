//! The supervisor for hosts without systemd, on a simulated host.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

mod conformance;

use conformance::{Places, Stand, sentences};
use enclaved::host::direct::{Direct, HelperCommand};
use enclaved::launches::LaunchSettings;
use enclaved_integration::binaries;
use enclaved_integration::nitro_host::{NitroHost, Shape};

fn stand() -> Stand<Direct> {
    let host = NitroHost::new(&Shape::small()).unwrap();
    let at = |name: &str| host.path().join(name);
    let launches = LaunchSettings {
        run_dir: at("run"),
        images_dir: at("images"),
        stopped_dir: at("stopped"),
        nitro_cli: host.nitro_cli(),
    };
    let places =
        Places { launches, sysfs: host.sysfs(), vsock: host.vsock(), state: at("state"), faults: at("faults.json") };
    Stand::new(places, host, |places| {
        let helper = HelperCommand { program: binaries::find("enclaved").unwrap(), arguments: vec!["launch".into()] };
        Direct::new(places.launches.clone(), helper).unwrap()
    })
}

macro_rules! play {
    ($($sentence:ident)*) => {
        $(
            #[tokio::test]
            async fn $sentence() {
                conformance::$sentence(stand()).await;
            }
        )*
    };
}
sentences!(play);
