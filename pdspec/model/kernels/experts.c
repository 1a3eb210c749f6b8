/* Which experts a token passes, and with what weight; each row for itself, in one order of operations. */
#include "pdk.h"
#include <math.h>

typedef struct {
    int32_t experts, chosen, groups, groups_kept, sigmoid, normalise;
    float scaling;
} Route;

static float exp_of(float x) { return vexp(splat(x))[0]; }

static void score_row(const float *logits, float *scores, const Route *t) {
    if (t->sigmoid) {
        for (int e = 0; e < t->experts; e++) scores[e] = 1.0f / (1.0f + exp_of(logits[e] < -80.0f ? 80.0f : -logits[e]));
        return;
    }
    float top = logits[0], sum = 0;
    for (int e = 1; e < t->experts; e++) top = logits[e] > top ? logits[e] : top;
    for (int e = 0; e < t->experts; e++) sum += scores[e] = exp_of(logits[e] - top);
    for (int e = 0; e < t->experts; e++) scores[e] /= sum;
}

/* The index of the largest of n values that is not taken; the lowest of equals, and of what compares with nothing. */
static int best_of(const float *values, const char *taken, int n) {
    int best = -1;
    for (int i = 0; i < n; i++)
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    return best;
}

/* A group counts as much as its two best experts; those of groups that are not kept are marked as taken. */
static void drop_groups(const float *choice, char *taken, const Route *t) {
    const int size = t->experts / t->groups;
    float worth[t->groups];
    char kept[t->groups];
    memset(kept, 0, (size_t)t->groups);
    for (int g = 0; g < t->groups; g++) {
        const float *own = choice + g * size;
        char *mark = taken + g * size;
        int first = best_of(own, mark, size);
        mark[first] = 1;
        worth[g] = own[first] + own[best_of(own, mark, size)];
        mark[first] = 0;
    }
    for (int i = 0; i < t->groups_kept; i++) kept[best_of(worth, kept, t->groups)] = 1;
    for (int g = 0; g < t->groups; g++) memset(taken + g * size, !kept[g], (size_t)size);
}

/* ids, weights [R, chosen], best first, of router logits [R, experts]; bias [experts] or NULL takes part in the choice
 * alone. chosen <= experts of the kept groups, and groups of one expert are one group (checked in Python). */
void pd_route(const float *logits, const float *bias, int R, const Route *t, int32_t *ids, float *weights) {
    float scores[t->experts], choice[t->experts];
    char taken[t->experts];
    for (int r = 0; r < R; r++, ids += t->chosen, weights += t->chosen) {
        score_row(logits + (size_t)r * t->experts, scores, t);
        for (int e = 0; e < t->experts; e++) choice[e] = bias ? scores[e] + bias[e] : scores[e];
        memset(taken, 0, sizeof taken);
        if (t->groups > 1) drop_groups(choice, taken, t);
        float sum = 1e-20f;
        for (int i = 0; i < t->chosen; i++) {
            ids[i] = best_of(choice, taken, t->experts);
            taken[ids[i]] = 1;
            sum += weights[i] = scores[ids[i]];
        }
        for (int i = 0; i < t->chosen; i++) weights[i] = (t->normalise ? weights[i] / sum : weights[i]) * t->scaling;
    }
}
