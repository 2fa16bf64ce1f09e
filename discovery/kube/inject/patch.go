package inject

import (
	"encoding/json"
	"fmt"

	"gomodules.xyz/jsonpatch/v2"
	corev1 "k8s.io/api/core/v1"
)

// Patch is what Pod changes, as RFC 6902 operations on a Pod or a template of one in JSON. Fields that this program does not know stay as they are. It is empty, and says why, where
// no sidecar is wanted.
func (v *Values) Patch(namespace map[string]string, pod []byte) (patch []jsonpatch.Operation, why string, err error) {
	var p corev1.PodTemplateSpec
	if err := json.Unmarshal(pod, &p); err != nil {
		return nil, "", fmt.Errorf("decode Pod: %w", err)
	}
	before, err := json.Marshal(p)
	if err != nil {
		return nil, "", err
	}
	yes, why, err := Wanted(namespace, &p.ObjectMeta, &p.Spec)
	if err != nil || !yes {
		return nil, why, err
	}
	if err := v.Pod(&p.ObjectMeta, &p.Spec); err != nil {
		return nil, "", err
	}
	after, err := json.Marshal(p)
	if err != nil {
		return nil, "", err
	}
	patch, err = jsonpatch.CreatePatch(before, after)
	return patch, "", err
}
