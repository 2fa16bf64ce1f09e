//go:build linux

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// volume is where a program keeps its state: the lab has no storage of its own.
func (c *cluster) volume(name string) {
	c.s.t.Helper()
	dir := filepath.Join(os.Getenv(stateDir), "volume-"+c.Name+"-"+name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		c.s.t.Fatal(err)
	}
	c.apply(fmt.Sprintf(`apiVersion: v1
kind: PersistentVolume
metadata: {name: %s}
spec:
  capacity: {storage: 8Gi}
  accessModes: [ReadWriteOnce]
  local: {path: %s}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node-%s]}]}]}}
`, name, dir, c.Name))
}

// install puts Hanse into a cluster as its users do, with further values; other clusters reach it by ports of its node.
func (s *scene) install(c *cluster, values ...string) {
	s.t.Helper()
	args := []string{"install", "--context", c.Name, "--image-tag", version, "--timeout", "3m"}
	for _, v := range append([]string{"cluster=" + c.Name, "trustDomain=" + c.Name + ".example", "region=" + c.Name + "-1", "federation.service.type=NodePort", "gateway.service.type=NodePort"}, values...) {
		args = append(args, "--set", v)
	}
	s.hanse(args...)
}

// hanse runs hanse where it reaches both clusters.
func (s *scene) hanse(args ...string) string {
	s.t.Helper()
	out, err := s.tryHanse(args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *scene) tryHanse(args ...string) (string, error) {
	cmd := s.west.Command(s.ctx, filepath.Join(bin, "hanse"), args...)
	var files []string
	for _, c := range s.both() {
		files = append(files, c.Kubeconfig)
	}
	cmd.Env = append(cmd.Env, "KUBECONFIG="+strings.Join(files, ":"))
	if _, err := os.Stat(s.contexts()); err == nil {
		cmd.Env = append(cmd.Env, "HANSE_CONFIG="+s.contexts())
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("hanse %s: %w\n%s%s", strings.Join(args, " "), err, &out, &errs)
	}
	return out.String(), nil
}

// holdsDrill: the drill passed, what was taken away was served by the other cluster, and no more calls failed than were broken off.
func (s *scene) holdsDrill(out string, brokeOff int) {
	s.t.Helper()
	var d struct {
		ID, State, Verdict, Reason string
		Calls, Failed, Retried     int
		Detect                     *float64 `json:"detectSeconds"`
		Shift                      *float64 `json:"shiftSeconds"`
		Return                     *float64 `json:"returnSeconds"`
		Traffic                    []struct {
			Cluster               string
			Before, During, After float64
		}
	}
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	s.t.Logf("drill %s: %s %s, %d calls, %d failed, %d retried, detected %s, shifted %s, back %s; %+v", d.ID, d.State, d.Verdict, d.Calls, d.Failed, d.Retried, seconds(d.Detect), seconds(d.Shift), seconds(d.Return), d.Traffic)
	if d.Verdict != "PASSED" || d.Failed > brokeOff || d.Calls == 0 {
		s.t.Errorf("drill: %s (%s), %d calls, %d failed", d.Verdict, d.Reason, d.Calls, d.Failed)
	}
	var east float64
	for _, share := range d.Traffic {
		if share.Cluster == "east" {
			east += share.During
		}
	}
	if east < 0.9 {
		s.t.Errorf("east took %.0f %% of the calls, not nearly all", 100*east)
	}
}

func seconds(v *float64) string {
	if v == nil {
		return "never"
	}
	return fmt.Sprintf("after %.1f s", *v)
}
