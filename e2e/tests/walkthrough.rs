//! What `make demo` shows, step by step, on both emulators.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use std::collections::BTreeMap;
use tgb_e2e::walkthrough::{self, Fidelity, Silent};
use tgb_e2e::{Aws, Cluster, Options, Settings, Setup, World};

fn walk(aws: fn(&Cluster) -> tgb_e2e::Result<Aws>, fidelity: Fidelity, product: &Settings) {
    let world = World::start(&Setup { cluster: Options::default(), product, aws }).unwrap();
    world.cluster.namespace("shop", &BTreeMap::new()).unwrap();
    if let Err(error) = walkthrough::run(&world.cluster, &world.aws, "shop", fidelity, &mut Silent) {
        panic!("{}\n{error}", world.report(&["shop".to_owned()], &world.product.names(), &world.aws));
    }
}

#[test]
fn the_walkthrough_ends_well_on_awsim() {
    walk(|_| Aws::awsim(), Fidelity::Full, &Settings::default());
}

#[test]
fn the_walkthrough_ends_well_on_moto_with_the_webhook_on_the_machines_own_address() {
    walk(Aws::moto, Fidelity::Moto, &Settings { by_own_address: true, ..Settings::default() });
}
