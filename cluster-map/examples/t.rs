use cluster_map::ring::*;
use cluster_map::*;
use std::time::Instant;
fn m(n: u32, z: &str) -> Member {
    let mut id = [0u8; 16];
    id[..8].copy_from_slice(&(u64::from(n).wrapping_mul(0x9e3779b97f4a7c15)).to_be_bytes());
    id[12..].copy_from_slice(&(n + 1).to_be_bytes());
    Member { store: StoreId(id), node: NodeId(id), zone: z.into(), capacity_bytes: 1 << 40, weight: 1000 }
}
fn main() {
    for (n, z) in
        [(1000u32, 0u32), (1000, 3), (1000, 4), (1000, 10), (10000, 0), (10000, 10), (10, 0), (4, 0)]
    {
        let zn = |i: u32| if z == 0 { String::new() } else { format!("z{}", i % z) };
        let ms: Vec<Member> = (0..n).map(|i| m(i, &zn(i))).collect();
        let t = Instant::now();
        let r =
            Ring::compute(Rules { kind: Kind::Balanced, copies: 3, partition_bits: 16 }, ms.clone(), None)
                .unwrap();
        let t0 = t.elapsed();
        let c = r.counts();
        print!("n={n} z={z} fresh {t0:?} min {} max {}", c.iter().min().unwrap(), c.iter().max().unwrap());
        let t = Instant::now();
        let a = r.change(vec![m(n, "z1")], &[]).unwrap();
        let e = t.elapsed();
        let p = Plan::between(&r, &a, |_| 1);
        print!(" | +1 {e:?} {}/{}", p.copies(), p.least_moves);
        let t = Instant::now();
        let a = r.change(vec![], &[ms[3].store]).unwrap();
        let e = t.elapsed();
        let p = Plan::between(&r, &a, |_| 1);
        print!(" | -1 {e:?} {}/{}", p.copies(), p.least_moves);
        if z > 0 {
            let gone: Vec<_> = (0..n).filter(|i| i % z == 1).map(|i| ms[i as usize].store).collect();
            let t = Instant::now();
            let a = r.change(vec![], &gone).unwrap();
            let e = t.elapsed();
            let p = Plan::between(&r, &a, |_| 1);
            print!(" | -zone {e:?} {}/{}", p.copies(), p.least_moves);
            let back: Vec<_> = (0..n).filter(|i| i % z == 1).map(|i| ms[i as usize].clone()).collect();
            let t = Instant::now();
            let b = a.change(back, &[]).unwrap();
            let e = t.elapsed();
            let p = Plan::between(&a, &b, |_| 1);
            print!(" | +zone {e:?} {}/{}", p.copies(), p.least_moves);
        }
        let t = Instant::now();
        let two = Ring::compute(
            Rules { kind: Kind::Balanced, copies: 2, partition_bits: 16 },
            ms.clone(),
            Some(&r),
        )
        .unwrap();
        let e = t.elapsed();
        let p = Plan::between(&r, &two, |_| 1);
        print!(" | to 2 {e:?} {}/{}", p.copies(), p.least_moves);
        let t = Instant::now();
        let th = Ring::compute(
            Rules { kind: Kind::Balanced, copies: 3, partition_bits: 16 },
            ms.clone(),
            Some(&two),
        )
        .unwrap();
        let e = t.elapsed();
        let p = Plan::between(&two, &th, |_| 1);
        print!(" | to 3 {e:?} {}/{}", p.copies(), p.least_moves);
        let k = Ring::compute(Rules { kind: Kind::Mod, copies: 3, partition_bits: 16 }, ms.clone(), None)
            .unwrap();
        let t = Instant::now();
        let th = Ring::compute(
            Rules { kind: Kind::Balanced, copies: 3, partition_bits: 16 },
            ms.clone(),
            Some(&k),
        )
        .unwrap();
        let e = t.elapsed();
        let p = Plan::between(&k, &th, |_| 1);
        print!(" | from mod {e:?} {}/{}", p.copies(), p.least_moves);
        println!();
    }
}
