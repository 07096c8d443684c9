//! Prints the CustomResourceDefinition as JSON. `cargo run -p tgb-api --example crd [v1|v1beta1|v1alpha1]`: the stored
//! version.

use tgb_api::crd::{Version, crd};

fn main() {
    let wanted = std::env::args().nth(1).unwrap_or_else(|| "v1".to_owned());
    let storage = Version::ALL.into_iter().find(|version| version.name() == wanted).unwrap_or(Version::V1);
    println!("{:#}", crd(storage));
}
