fn main() {
    println!("{:#}", enclaved::config::schema());
}
