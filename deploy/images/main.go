// Command images packs static programs into OCI image archives (OCI image-spec v1.1: an image layout in a tar file), without a container engine
// or a registry. `make images` runs it; `ctr image import`, `podman load`, `skopeo copy oci-archive:…` and `kind load image-archive` read what it writes.
//
// An image holds its program, /etc/passwd and an empty /tmp, and runs as 65532:65532. The same program gives the same bytes.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	_ "crypto/sha256" // of digests
	"debug/elf"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
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
		if err := pack(file, program, image, *arch); err != nil {
			fail(fmt.Errorf("%s: %w", program, err))
		}
		fmt.Println(image, file)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "error:", err)
	os.Exit(1)
}

// pack writes the archive of one program. A file that exists is replaced at once or not at all.
func pack(file, program, image, arch string) error {
	if err := static(program); err != nil {
		return err
	}
	b, err := build(program, image, arch)
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", b, 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// static refuses a program that needs a dynamic linker, which the image does not have.
func static(program string) error {
	f, err := elf.Open(program)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("is linked dynamically: build it with CGO_ENABLED=0")
		}
	}
	return nil
}

// epoch is the time of everything in an image.
var epoch = time.Unix(0, 0).UTC()

// build returns an image layout as a tar file.
func build(program, image, arch string) ([]byte, error) {
	binary, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	path := "/" + filepath.Base(program)
	plain, err := layer(path, binary)
	if err != nil {
		return nil, err
	}
	var packed bytes.Buffer
	z, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if _, err := z.Write(plain); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	var blobs [][]byte
	add := func(mediaType string, b []byte) v1.Descriptor {
		blobs = append(blobs, b)
		return v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	}
	addJSON := func(mediaType string, v any) (v1.Descriptor, error) {
		b, err := json.Marshal(v)
		return add(mediaType, b), err
	}
	config, err := addJSON(v1.MediaTypeImageConfig, v1.Image{
		Created: &epoch, Platform: v1.Platform{Architecture: arch, OS: "linux"},
		Config: v1.ImageConfig{User: "65532:65532", Entrypoint: []string{path}, WorkingDir: "/", Env: []string{"PATH=/"}},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(plain)}},
	})
	if err != nil {
		return nil, err
	}
	manifest, err := addJSON(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: config,
		Layers: []v1.Descriptor{add(v1.MediaTypeImageLayerGzip, packed.Bytes())},
	})
	if err != nil {
		return nil, err
	}
	manifest.Platform = &v1.Platform{Architecture: arch, OS: "linux"}
	manifest.Annotations = map[string]string{
		v1.AnnotationRefName: tag(image), "io.containerd.image.name": image, // which image it is, to skopeo and to containerd
	}
	index, err := json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{manifest}})
	if err != nil {
		return nil, err
	}
	marker, err := json.Marshal(v1.ImageLayout{Version: v1.ImageLayoutVersion})
	if err != nil {
		return nil, err
	}
	files := []entry{{name: v1.ImageLayoutFile, data: marker}, {name: v1.ImageIndexFile, data: index}, {name: "blobs/", dir: true}, {name: "blobs/sha256/", dir: true}}
	for _, b := range blobs {
		files = append(files, entry{name: "blobs/sha256/" + digest.FromBytes(b).Encoded(), data: b})
	}
	return archive(files)
}

func tag(image string) string { return image[strings.LastIndexByte(image, ':')+1:] }

// layer is the file system.
func layer(path string, program []byte) ([]byte, error) {
	return archive([]entry{
		{name: "etc/", dir: true},
		{name: "etc/passwd", data: []byte("root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n")},
		{name: "etc/group", data: []byte("root:x:0:\nnonroot:x:65532:\n")},
		{name: path[1:], data: program, mode: 0o755},
		{name: "tmp/", dir: true, mode: 0o1777},
	})
}

type entry struct {
	name string
	dir  bool
	mode int64 // default 0755 for directories, 0644 for files
	data []byte
}

func archive(entries []entry) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: e.name, Size: int64(len(e.data)), Mode: 0o644, ModTime: epoch, Format: tar.FormatUSTAR}
		if e.dir {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		if e.mode != 0 {
			h.Mode = e.mode
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.Copy(w, bytes.NewReader(e.data)); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
