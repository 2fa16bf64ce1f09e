// Package oci packs static programs into OCI image archives (OCI image-spec v1.1: an image layout in a tar file), without a container engine or a registry.
//
// An image holds its files, /etc/passwd and an empty /tmp, and runs as 65532:65532. The same files give the same bytes.
package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	_ "crypto/sha256" // of digests
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is what is packed.
type Image struct {
	Name       string // with tag
	Arch       string
	Entrypoint string            // the path of one of Files
	Files      map[string][]byte // by absolute path; programs, which begin with ELF's magic, are executable
}

// Write writes the archive. A file that exists is replaced at once or not at all.
func (m *Image) Write(file string) error {
	b, err := m.build()
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", b, 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// program reports whether a file is one; one that needs a dynamic linker, which the image does not have, is an error.
func program(b []byte) (bool, error) {
	if !bytes.HasPrefix(b, []byte(elf.ELFMAG)) {
		return false, nil
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return true, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return true, errors.New("is linked dynamically: build it with CGO_ENABLED=0")
		}
	}
	return true, nil
}

// epoch is the time of everything in an image.
var epoch = time.Unix(0, 0).UTC()

// build returns an image layout as a tar file.
func (m *Image) build() ([]byte, error) {
	plain, err := m.layer()
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
		Created: &epoch, Platform: v1.Platform{Architecture: m.Arch, OS: "linux"},
		Config: v1.ImageConfig{User: "65532:65532", Entrypoint: []string{m.Entrypoint}, WorkingDir: "/", Env: []string{"PATH=" + path.Dir(m.Entrypoint)}},
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
	manifest.Platform = &v1.Platform{Architecture: m.Arch, OS: "linux"}
	manifest.Annotations = map[string]string{
		v1.AnnotationRefName: tag(m.Name), "io.containerd.image.name": m.Name, // which image it is, to skopeo and to containerd
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
func (m *Image) layer() ([]byte, error) {
	if _, ok := m.Files[m.Entrypoint]; !ok {
		return nil, fmt.Errorf("%s is not among the files", m.Entrypoint)
	}
	entries := []entry{
		{name: "etc/", dir: true},
		{name: "etc/passwd", data: []byte("root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n")},
		{name: "etc/group", data: []byte("root:x:0:\nnonroot:x:65532:\n")},
		{name: "tmp/", dir: true, mode: 0o1777},
	}
	have := map[string]bool{"/etc": true, "/tmp": true, "/": true}
	var above func(dir string)
	above = func(dir string) {
		if have[dir] {
			return
		}
		above(path.Dir(dir))
		have[dir] = true
		entries = append(entries, entry{name: dir[1:] + "/", dir: true})
	}
	for _, name := range slices.Sorted(maps.Keys(m.Files)) {
		if !path.IsAbs(name) || path.Clean(name) != name {
			return nil, fmt.Errorf("%q is not an absolute path", name)
		}
		e := entry{name: name[1:], data: m.Files[name]}
		switch is, err := program(e.data); {
		case err != nil:
			return nil, fmt.Errorf("%s %w", name, err)
		case is:
			e.mode = 0o755
		}
		above(path.Dir(name))
		entries = append(entries, e)
	}
	return archive(entries)
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
