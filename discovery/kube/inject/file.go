package inject

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"
)

// Workload is one object of a file that has Pods, and what became of it.
type Workload struct {
	Kind, Namespace, Name string
	Injected              bool
	Why                   string // why not
}

// maxFile bounds a file: a larger one is no list of workloads.
const maxFile = 64 << 20

// File puts a sidecar into every Pod and every template of Pods in a stream of YAML or JSON documents, unless it says that it wants none. Everything else is passed through as it is,
// comments included. Where something is wrong with one, nothing is returned, and the error has every fault.
func (v *Values) File(data []byte) ([]byte, []Workload, error) {
	if len(data) > maxFile {
		return nil, nil, fmt.Errorf("larger than %d MiB", maxFile>>20)
	}
	var out bytes.Buffer
	var workloads []Workload
	var faults []error
	r := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for n := 1; ; n++ {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, nil, err
		}
		if n > 1 {
			out.WriteString("---\n")
		}
		var o map[string]any
		if err := sigsyaml.Unmarshal(doc, &o); err != nil {
			return nil, nil, fmt.Errorf("document %d: %w", n, err)
		}
		var found []Workload
		if err := v.object(o, &found); err != nil {
			faults = append(faults, fmt.Errorf("document %d: %w", n, err))
			continue
		}
		workloads = append(workloads, found...)
		changed := false
		for _, w := range found {
			changed = changed || w.Injected
		}
		if changed {
			if doc, err = sigsyaml.Marshal(o); err != nil {
				return nil, nil, err
			}
		}
		out.Write(doc)
		if !bytes.HasSuffix(doc, []byte("\n")) && len(doc) > 0 {
			out.WriteByte('\n')
		}
	}
	if err := errors.Join(faults...); err != nil {
		return nil, nil, err
	}
	return out.Bytes(), workloads, nil
}

// templates is where an object of a kind has its Pods.
var templates = map[string][]string{
	"Pod": {}, "Deployment": {"spec", "template"}, "StatefulSet": {"spec", "template"}, "DaemonSet": {"spec", "template"}, "ReplicaSet": {"spec", "template"},
	"ReplicationController": {"spec", "template"}, "Job": {"spec", "template"}, "CronJob": {"spec", "jobTemplate", "spec", "template"},
}

// object changes o.
func (v *Values) object(o map[string]any, found *[]Workload) error {
	kind, _ := o["kind"].(string)
	if items, ok := o["items"].([]any); ok {
		var faults []error
		for _, item := range items {
			if m, ok := item.(map[string]any); ok {
				faults = append(faults, v.object(m, found))
			}
		}
		return errors.Join(faults...)
	}
	path, ok := templates[kind]
	if !ok {
		return nil
	}
	meta, _ := o["metadata"].(map[string]any)
	w := Workload{Kind: kind}
	w.Name, _ = meta["name"].(string)
	w.Namespace, _ = meta["namespace"].(string)
	parent, last, pod := o, "", o
	for _, step := range path {
		next, ok := pod[step].(map[string]any)
		if !ok {
			return fmt.Errorf("%s %s: it has no %s", kind, w.Name, step)
		}
		parent, last, pod = pod, step, next
	}
	if _, ok := pod["metadata"].(map[string]any); !ok {
		pod["metadata"] = map[string]any{}
	}
	b, err := json.Marshal(pod)
	if err != nil {
		return err
	}
	ops, why, err := v.Patch(map[string]string{Label: enabled}, b)
	if err != nil {
		return fmt.Errorf("%s %s: %w", kind, w.Name, err)
	}
	w.Injected, w.Why = len(ops) > 0, why
	*found = append(*found, w)
	if len(ops) == 0 {
		return nil
	}
	text, err := json.Marshal(ops)
	if err != nil {
		return err
	}
	patch, err := jsonpatch.DecodePatch(text)
	if err != nil {
		return err
	}
	if b, err = patch.Apply(b); err != nil {
		return fmt.Errorf("%s %s: %w", kind, w.Name, err)
	}
	var next map[string]any
	if err := json.Unmarshal(b, &next); err != nil {
		return err
	}
	if last != "" {
		parent[last] = next
		return nil
	}
	clear(o)
	maps.Copy(o, next)
	return nil
}
