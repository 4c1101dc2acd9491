use super::*;

/// A unit whose adapter has so many bytes.
fn unit(home: &Path, lease: &str, bytes: usize) -> Unit {
    let work = v1::TrainWork {
        round_id: "r".to_owned(),
        shard: 2,
        ..Default::default()
    };
    let lease = v1::Lease {
        id: lease.to_owned(),
        work: Some(v1::lease::Work::Train(work)),
        ..Default::default()
    };
    let unit = Unit::claimed(&home.join("work"), lease, "w").unwrap();
    fs::create_dir(unit.dir.join(ADAPTER_FOLDER)).unwrap();
    fs::write(
        unit.dir.join(ADAPTER_FOLDER).join("weights"),
        vec![0; bytes],
    )
    .unwrap();
    fs::create_dir(unit.dir.join(STATES_FOLDER)).unwrap();
    unit
}

fn request(lease: &str) -> v1::SubmitAdapterRequest {
    v1::SubmitAdapterRequest {
        request_id: "q".to_owned(),
        lease_id: lease.to_owned(),
        ..Default::default()
    }
}

#[test]
fn an_acknowledged_unit_becomes_a_kept_submission() {
    let home = tempfile::tempdir().unwrap();
    let submitted = home.path().join("submitted");
    fs::create_dir(&submitted).unwrap();
    let unit = unit(home.path(), "l1", 10);
    let asked = v1::AuditRequest {
        segment: 3,
        until_ms: 77,
    };
    let kept = Kept::take(&submitted, &unit, &request("l1"), "s1", Some(&asked)).unwrap();
    assert!(!unit.dir.exists());
    unit.forget();
    let mut all = Kept::all(&submitted, "w");
    assert_eq!(all, [kept]);
    assert!(Kept::all(&submitted, "other").is_empty());
    let kept = &mut all[0];
    assert_eq!(kept.request().unwrap(), request("l1"));
    assert_eq!(kept.info.name, "shard 2 of round r");
    let audit = kept.info.audit.as_mut().unwrap();
    assert_eq!(
        (audit.segment, audit.until_ms, audit.opened),
        (3, 77, false)
    );
    audit.opened = true;
    kept.save();
    assert!(Kept::all(&submitted, "w")[0].info.audit.unwrap().opened);
    assert_eq!(kept.commitment(), None);
    kept.judged();
    assert!(!kept.states().exists() && kept.adapter().exists());
    kept.settled();
    assert!(Kept::all(&submitted, "w").is_empty());
}

#[test]
fn a_hostile_id_is_no_folder() {
    let home = tempfile::tempdir().unwrap();
    let unit = unit(home.path(), "l1", 10);
    for id in ["", "..", "a/b", "../work"] {
        assert!(Kept::take(home.path(), &unit, &request("l1"), id, None).is_err());
    }
    assert!(unit.dir.exists());
}

#[test]
fn the_oldest_and_the_foreign_go_and_the_newest_stays() {
    let home = tempfile::tempdir().unwrap();
    let submitted = home.path().join("submitted");
    fs::create_dir(&submitted).unwrap();
    let ids = ["s1", "s2", "s3", "s4"];
    for (age, id) in ids.into_iter().enumerate() {
        let unit = unit(home.path(), id, 4000);
        let mut kept = Kept::take(&submitted, &unit, &request(id), id, None).unwrap();
        kept.info.kept_ms = 1000 + age as i64;
        kept.save();
    }
    fs::create_dir(submitted.join("broken")).unwrap();
    let left = |count_max, bytes_max| {
        prune(&submitted, "w", count_max, bytes_max);
        Kept::all(&submitted, "w")
            .into_iter()
            .map(|kept| kept.id)
            .collect::<Vec<_>>()
    };
    assert_eq!(left(9, u64::MAX), ["s4", "s3", "s2", "s1"]);
    assert!(!submitted.join("broken").exists());
    assert_eq!(left(3, u64::MAX), ["s4", "s3", "s2"]);
    assert_eq!(left(9, 11_000), ["s4", "s3"]);
    assert_eq!(left(9, 1), ["s4"]);
    assert!(left(0, 0) == ["s4"]);
    prune(&submitted, "other", 9, u64::MAX);
    assert!(fs::read_dir(&submitted).unwrap().next().is_none());
}
