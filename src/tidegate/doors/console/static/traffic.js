// The traffic history, which older servers do not have.

import { get } from "./api.js";

/** The history of a range; null where the server has none. */
export async function traffic(query, options) {
  try {
    return { latency: [], ...(await get("/traffic", query, options)) };
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}
