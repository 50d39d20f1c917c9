//! The daemon's own checks, as an operator sees them in `systemctl status`.

use super::DEADLINE;
use enclaved_integration::machine::parent::parent_host;

const STOCK: &str = "/usr/lib/systemd/system/nitro-enclaves-allocator.service";

#[test]
fn a_check_that_fails_is_named_in_systemctl_status_until_it_passes() {
    let parent = parent_host().unwrap();
    parent.put_image("/srv/a.eif", &parent.sample_application("a")).unwrap();
    parent.configure(&parent.sample_enclave("a", "/srv/a.eif")).unwrap();
    let config = parent.read("/etc/enclaved/enclaved.toml").unwrap().replace("\"verify\"", "\"manage\"");
    parent.write("/etc/enclaved/enclaved.toml", config).unwrap();
    let unit = parent.read(STOCK).unwrap();
    parent.run_ok(&["rm", STOCK]).unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    parent.run_ok(&["systemctl", "start", "enclaved"]).unwrap();
    let says = |what: &str| Ok::<_, anyhow::Error>(parent.property("enclaved", "StatusText")?.contains(what));
    let failed = "check allocator_service failed, see enclavectl doctor";
    parent.wait_until("the check is named", DEADLINE, || Ok(says(failed)?.then_some(()))).unwrap();
    let status = parent.run(&["systemctl", "status", "--no-pager", "enclaved"]).unwrap();
    assert!(status.stdout.contains(failed), "{status:?}");
    let doctor = parent.run(&["enclavectl", "doctor"]).unwrap();
    assert!(doctor.code == Some(78) && doctor.stdout.contains("allocator_service"), "{doctor:?}");
    parent.write(STOCK, unit).unwrap();
    parent.run_ok(&["systemctl", "daemon-reload"]).unwrap();
    parent.wait_until("it passes", DEADLINE, || Ok((!says("allocator_service")?).then_some(()))).unwrap();
}
