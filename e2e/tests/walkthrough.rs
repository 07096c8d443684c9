//! What `make demo` shows, step by step, on both emulators.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use tgb_e2e::walkthrough::{self, Fidelity, Silent};
use tgb_e2e::{Aws, Cluster, Options, Product, Settings};

fn walk(start: fn(&Cluster) -> tgb_e2e::Result<Aws>, fidelity: Fidelity, settings: &Settings) {
    let cluster =
        Cluster::start(Options { reachable: settings.by_own_address, ..Options::default() }).unwrap();
    let aws = start(&cluster).unwrap();
    cluster.nodes(&aws.nodes()).unwrap();
    Product::start(&cluster, &aws, settings).unwrap();
    cluster.namespace("shop").unwrap();
    if let Err(error) = walkthrough::run(&cluster, &aws, "shop", fidelity, &mut Silent) {
        panic!("{}\n{}\n{error}", aws.journal(), cluster.report("shop", &["tgb-webhook", "tgb-controller"]));
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
