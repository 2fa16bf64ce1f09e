package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// compiled is a static program.
func compiled(t *testing.T, static bool) string {
	t.Helper()
	dir := t.TempDir()
	src := "package main\n\nfunc main() { println(\"hello\") }\n"
	if !static {
		src = "package main\n\nimport \"C\"\n\nfunc main() {}\n"
	}
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "hello")
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, filepath.Join(dir, "main.go"))
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+map[bool]string{true: "0", false: "1"}[static])
	if b, err := cmd.CombinedOutput(); err != nil {
		if !static {
			t.Logf("no C compiler, so that nothing dynamic can be built: %s", b)
			return ""
		}
		t.Fatalf("%v: %s", err, b)
	}
	return out
}

func pack(file, program, name string) error {
	b, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	m := Image{Name: name, Arch: "amd64", Entrypoint: "/hello", Files: map[string][]byte{"/hello": b, "/usr/share/a.txt": []byte("a")}}
	return m.Write(file)
}

func untar(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if out[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}

// TestArchive reads an archive back by the image-spec: layout, index, manifest, config, layer, each digest.
func TestArchive(t *testing.T) {
	bin := compiled(t, true)
	dir := t.TempDir()
	file := filepath.Join(dir, "hello.tar")
	if err := pack(file, bin, "hanse.mesh/hello:v1"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	files := untar(t, bytes.NewReader(b))
	blob := func(d v1.Descriptor) []byte {
		b := files["blobs/sha256/"+d.Digest.Encoded()]
		if digest.FromBytes(b) != d.Digest || int64(len(b)) != d.Size {
			t.Fatalf("blob %s is not what its descriptor says", d.Digest)
		}
		return b
	}
	var layout v1.ImageLayout
	var index v1.Index
	var manifest v1.Manifest
	var config v1.Image
	decode := func(b []byte, v any) {
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	decode(files["oci-layout"], &layout)
	decode(files["index.json"], &index)
	if layout.Version != "1.0.0" || len(index.Manifests) != 1 || index.Manifests[0].Annotations["io.containerd.image.name"] != "hanse.mesh/hello:v1" {
		t.Fatalf("layout %+v, index %+v", layout, index)
	}
	decode(blob(index.Manifests[0]), &manifest)
	decode(blob(manifest.Config), &config)
	if config.Config.User != "65532:65532" || !slices.Equal(config.Config.Entrypoint, []string{"/hello"}) || config.Architecture != "amd64" {
		t.Fatalf("config %+v", config)
	}
	z, err := gzip.NewReader(bytes.NewReader(blob(manifest.Layers[0])))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if digest.FromBytes(plain) != config.RootFS.DiffIDs[0] {
		t.Error("the layer's diff ID is wrong")
	}
	want, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	if in := untar(t, bytes.NewReader(plain)); !bytes.Equal(in["hello"], want) || !strings.Contains(string(in["etc/passwd"]), "65532") || string(in["usr/share/a.txt"]) != "a" {
		t.Error("the layer is not the program's")
	}
	again := filepath.Join(dir, "again.tar")
	if err := pack(again, bin, "hanse.mesh/hello:v1"); err != nil {
		t.Fatal(err)
	}
	if b2, err := os.ReadFile(again); err != nil || !bytes.Equal(b, b2) {
		t.Errorf("the same program gave other bytes (%v)", err)
	}
}

// TestDynamicIsRefused: there is no linker in the image.
func TestDynamicIsRefused(t *testing.T) {
	bin := compiled(t, false)
	if bin == "" {
		bin, _ = exec.LookPath("sh")
	}
	file := filepath.Join(t.TempDir(), "x.tar")
	if err := pack(file, bin, "hanse.mesh/x:v1"); err == nil || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Errorf("a dynamic program was packed: %v", err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("and left a file")
	}
}
