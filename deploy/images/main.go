// Command images packs static programs into OCI image archives, one each. `make images` runs it; `ctr image import`, `podman load`, `skopeo copy oci-archive:…` and
// `kind load image-archive` read what it writes.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/hanse-mesh/hanse/deploy/oci"
)

func main() {
	out := flag.String("out", "bin/images", "directory of the archives")
	prefix := flag.String("prefix", "hanse.mesh/", "before a program's name in the image's")
	version := flag.String("version", "", "tag; required")
	arch := flag.String("arch", runtime.GOARCH, "architecture that the programs were built for")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: images -version v1.2.3 [flags] PROGRAM…\n\nWrites OUT/<program>.tar for each program.")
		flag.PrintDefaults()
	}
	flag.Parse()
	if *version == "" || flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := os.MkdirAll(*out, 0o755); err != nil {
		fail(err)
	}
	for _, program := range flag.Args() {
		name := filepath.Base(program)
		image := *prefix + name + ":" + *version
		file := filepath.Join(*out, name+".tar")
		b, err := os.ReadFile(program)
		if err != nil {
			fail(err)
		}
		m := oci.Image{Name: image, Arch: *arch, Entrypoint: "/" + name, Files: map[string][]byte{"/" + name: b}}
		if err := m.Write(file); err != nil {
			fail(fmt.Errorf("%s: %w", program, err))
		}
		fmt.Println(image, file)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "error:", err)
	os.Exit(1)
}
