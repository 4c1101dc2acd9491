use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::data::{Example, batches, pack};
use crate::device::DeviceName;
use crate::memory::Limit;
use crate::model::llama::Keep;
use crate::preflight::estimate::program;

/// What the next looks find, in MiB: one after the other, the last again and again.
static LEFT: AtomicU64 = AtomicU64::new(0);
static LOOKS: AtomicU64 = AtomicU64::new(0);

fn look() -> Option<Memory> {
    let looks = LOOKS.fetch_add(1, Ordering::Relaxed);
    let left = LEFT.load(Ordering::Relaxed);
    Some(Memory {
        // Nothing at the first look.
        available: if looks == 0 { 0 } else { left << 20 },
        // As if LibTorch, where it is there, were loaded already.
        held: program(DeviceName::default()) - program(DeviceName::Flex),
        limit: Limit::Machine,
    })
}

#[test]
fn steps_shrink_with_the_memory_and_wait_for_it() {
    let folder =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/models/llama-default");
    let model = LoadedModel::load(&folder, DeviceName::default()).unwrap();
    let recipe = Recipe::parse_toml(
        "rank = 2\nalpha = 4\ntarget_modules = \"all-linear\"\nlearning_rate = 0.1\nsteps = 1\n\
         batch_size = 4096\nsequence_length = 64\n",
    )
    .unwrap();
    let example = Example {
        tokens: vec![1; 64],
        scored: vec![true; 64],
        cut: false,
    };
    let examples = vec![example; 4096];
    let order: Vec<usize> = (0..4096).collect();
    let batch = batches(pack(&examples, &order, 64, false), 4096);
    let mut watch = Watch {
        look,
        ..Watch::new(&model, None, &recipe)
    };
    let cancel = CancelFlag::new();
    let mut step = |left: u64, looks: u64| {
        LEFT.store(left, Ordering::Relaxed);
        LOOKS.store(looks, Ordering::Relaxed);
        watch.before_step(&batch, &cancel).unwrap()
    };
    assert_eq!(step(1 << 20, 1), Passes::whole(4096));
    let mut before = Passes::whole(4096);
    for left in [1500, 1000, 600, 300, 200] {
        let now = step(left, 1);
        assert!(now.rows <= before.rows, "{left}: {now:?}");
        assert!(now.rows == before.rows || now.keep == Keep::Inputs);
        before = now;
    }
    assert!(before.rows < 4096);
    // Nothing at first, enough at the second look.
    assert_eq!(step(1 << 20, 0), Passes::whole(4096));
    assert!(LOOKS.load(Ordering::Relaxed) >= 2);
    cancel.cancel();
    LEFT.store(0, Ordering::Relaxed);
    assert_eq!(
        watch.before_step(&batch, &cancel),
        Ok(Passes::smallest(&recipe))
    );
}
